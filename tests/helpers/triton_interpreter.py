"""Triton kernels on a CPU: patches that correct the interpreter, and make it run in seconds instead of minutes."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip('triton')
import triton.language as tl
from triton.runtime import interpreter

from swinv2_mm.ops.triton import attention, tiles

PATCHED = set()
CREATE_DOT = interpreter.InterpreterBuilder.create_dot
NUMPY_TYPES = {}
GET_NUMPY_TYPE = interpreter._get_np_dtype
# skip the overflow check of 32-bit integers, which takes half of the time
UNCHECKED = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


class OnGpu(torch.Tensor):
    """A tensor whose `is_cuda` is true, for checks that compute nothing."""

    is_cuda = True


@contextlib.contextmanager
def poisoned_memory():
    """Fill allocated memory with NaN."""
    former = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = former
        torch.use_deterministic_algorithms(False)


def multiply(self, a, b, *args):
    """The dot product of the interpreter, corrected for bfloat16, of which it multiplies the bit patterns."""
    a, b = (
        interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if t.dtype.scalar == tl.bfloat16
        else t
        for t in (a, b)
    )
    return CREATE_DOT(self, a, b, *args)


def call(self, *args, **kwargs):
    """Like the interpreter, but patch the language once per module instead of in each call."""
    module = self.fn.__globals__['__name__']
    if module != 'swinv2_mm.ops.triton.kernels' and module not in PATCHED:  # the launch has done it
        interpreter._patch_lang(self.fn)
        PATCHED.add(module)
    return self.rewrite()(*args, **kwargs)


def numpy_type(dtype):
    """Like the interpreter, but cached: it builds a table of all types in each call."""
    element = dtype.scalar
    key = 'pointer' if element.is_ptr() else element.name
    if key not in NUMPY_TYPES:
        NUMPY_TYPES[key] = GET_NUMPY_TYPE(element)
    return NUMPY_TYPES[key]


def use_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test, use the largest tiles: the time of the interpreter hardly depends on their size."""
    monkeypatch.setattr(attention, 'box_tokens', lambda *_: 128)
    monkeypatch.setattr(attention, 'choose_tiles', lambda *_: tiles.TileConfig(128, 128, warps=4, stages=1))


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test, correct the interpreter and make it faster."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, 'create_dot', multiply)
    monkeypatch.setattr(interpreter.InterpretedFunction, '__call__', call)
    monkeypatch.setattr(interpreter, '_get_np_dtype', numpy_type)
    monkeypatch.setattr(interpreter.interpreter_builder, 'options', UNCHECKED)


def fuse_multiply_add(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    """For one test, round `a * b + c` in float32 only once, as the fused multiply-add of GPUs does.

    If both terms of a sum are products, the one at index `side` is not rounded.
    """
    builder = interpreter.InterpreterBuilder
    create_product = builder.create_fmul

    def multiply(self, *factors):
        product = create_product(self, *factors)
        product.attr['exact'] = create_product(self, *map(_double, factors))
        return product

    def move(create):
        def run(self, tile, to):
            moved = create(self, tile, to)
            if 'exact' in tile.attr:
                moved.attr['exact'] = create(self, tile.attr['exact'], to)
            return moved

        return run

    def add(create):
        def run(self, *terms):
            for place in (side, 1 - side):
                if 'exact' in terms[place].attr:
                    doubles = [_double(t) for t in terms]
                    doubles[place] = terms[place].attr['exact']
                    return interpreter.TensorHandle(create(self, *doubles).data.astype(np.float32), tl.float32)
            return create(self, *terms)

        return run

    monkeypatch.setattr(builder, 'create_fmul', multiply)
    for change, names in ((move, ('create_expand_dims', 'create_broadcast')), (add, ('create_fadd', 'create_fsub'))):
        for name in names:
            monkeypatch.setattr(builder, name, change(getattr(builder, name)))


def truncate_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test, truncate the operands of float32 products to TF32."""

    def read(tile):
        if tile.dtype.scalar != tl.float32:
            return tile
        return interpreter.TensorHandle((tile.data.view(np.uint32) & 0xFFFFE000).view(np.float32), tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder, 'create_dot', lambda self, a, b, *args: multiply(self, read(a), read(b), *args)
    )


def _double(tile: interpreter.TensorHandle) -> interpreter.TensorHandle:
    return interpreter.TensorHandle(tile.data.astype(np.float64), tl.float64)
