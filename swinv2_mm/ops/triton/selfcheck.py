"""Whether the kernels agree with the reference on this machine, which `auto` asks before it takes them.

Kernels that are right on one GPU can be wrong on another, or with another version of the compiler. The verdict for each
device, version, dtype, head size and kind of window is kept in the user's cache.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..files import write_whole
from ..reference import reference_window_attention
from ..sdpa import sdpa_window_attention
from ..tracing import assume_constant_result, is_compiling
from ..windows import Size
from . import attention as triton
from . import post_norm
from .launch import compile_launches, recorded
from .tiles import is_one_tile

WINDOWS = {True: (8, 8), False: (16, 16)}  # of one tile, and of several: each has kernels of its own
HEAD_DIMS = 16, 32, 64, 128  # channels of a head are padded to one of these
RESULTS = 'out', 'grad of qkv', 'grad of logit_scale', 'grad of bias_table'
# Parts of the largest value that rounding may take: float32 rounds logits of 116, float16 unit vectors times a scale
ROUNDING = {torch.float32: 4e-6, torch.float16: 0.008, torch.bfloat16: 0.016}

_verdicts: dict[tuple, str] = {}  # of this process, so that later calls neither read a file nor wait for the GPU


class NotCheckedError(Exception):
    """Something else than the kernels failed in the check, which says nothing of them: it is not kept."""


class Deviation(NamedTuple):
    """Largest error of a result, and the one that rounding explains, as parts of its largest value."""

    error: float
    allowed: float

    def __str__(self) -> str:
        return f'{self.error:.1e} (allowed {self.allowed:.1e})'


def why_not(qkv: Tensor, window_size: Size) -> str | None:
    """Tell why `auto` does not take the kernels for a feature map that they can run on, or None if it does.

    Without a verdict in the user's cache they are checked first, those that windows of this size need and no others.
    If they are wrong, one warning shows by how much.
    """
    head_dim = min(dim for dim in HEAD_DIMS if dim >= qkv.shape[-1])
    # a smaller feature map shrinks its windows, and a compiled graph should have no conditions on its size
    windows = (window_size, (1,)) if is_compiling() else (map(min, qkv.shape[1:-3], window_size),)
    kinds = dict.fromkeys(is_one_tile(math.prod(window), head_dim, qkv.dtype) for window in windows)
    for one_tile in kinds:
        reason = _why_not(qkv.device, qkv.dtype, head_dim, one_tile)
        if reason:
            return reason
    return None


def why_not_post_norm(branch: Tensor) -> str | None:
    """Tell the same of the kernels that add the norm of a residual branch."""
    return _why_not(branch.device, branch.dtype, None, False)


@assume_constant_result
def _why_not(device: torch.device, dtype: torch.dtype, head_dim: int | None, one_tile: bool) -> str | None:
    case = device, dtype, head_dim, one_tile, _is_tf32(dtype)
    if case not in _verdicts:
        key = describe(device, dtype, head_dim, one_tile)
        fault = _read().get(key)
        if not isinstance(fault, str):
            if _is_busy():
                return 'its kernels cannot be checked within a CUDA graph or a backward pass'
            try:
                # in a thread of its own, none of the caller's autocast, modes, hooks and transforms is active
                with ThreadPoolExecutor(1) as pool:
                    fault = pool.submit(check, device, dtype, head_dim, one_tile).result()
                keep({key: fault})
            except NotCheckedError as error:
                # for this process all the same: a block that is computed again must take the same kernels
                _verdicts[case] = str(error)
                _warn_unchecked_once(str(error))
                return 'its kernels could not be checked'
        _verdicts[case] = fault
        if fault:
            _warn_once(key, fault)
    return 'its kernels failed the self-check' if _verdicts[case] else None


def _is_busy() -> bool:
    """Whether a capture forbids other threads to use the GPU, or their backward pass would wait for this one."""
    is_captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return is_captured or torch._C._current_graph_task_id() != -1


@functools.cache
def _warn_once(key: str, fault: str) -> None:
    logging.getLogger('swinv2_mm').warning(
        "attention_backend='auto' does not take 'triton': its kernels failed the self-check %s, on %s. "
        'Delete %s, or run `python -m swinv2_mm.ops.selfcheck`, to check them again',
        fault,
        key,
        cache_file(),
    )


@functools.cache
def _warn_unchecked_once(error: str) -> None:
    logging.getLogger('swinv2_mm').warning(
        "attention_backend='auto' does not take 'triton' in this process: its kernels could not be checked %s", error
    )


def cache_file() -> Path:
    """Where verdicts are kept."""
    folder = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return Path(folder, 'swinv2_mm', 'triton_selfcheck.json')


def describe(device: torch.device, dtype: torch.dtype, head_dim: int | None, one_tile: bool = False) -> str:
    """What a verdict is valid for: attention with heads of a size in a kind of window, or the post-norm."""
    name = "Triton's interpreter"
    if device.type == 'cuda':
        name = f'{torch.cuda.get_device_name(device)} ({".".join(map(str, torch.cuda.get_device_capability(device)))})'
    versions = f'torch {torch.__version__}, triton {triton._triton_version()}, kernels {_digest()}'
    tiles = 'one tile' if one_tile else 'several tiles'
    kind = f'heads of up to {head_dim} channels, windows of {tiles}' if head_dim else 'post-norm'
    is_tf32 = bool(head_dim) and _is_tf32(dtype)  # the post-norm has no products
    return f'{name}, {versions}, {dtype}{" in TF32" * is_tf32}, {kind}'


@functools.cache
def _digest() -> str:
    """Digest of the kernels' source files and tile sizes."""
    files = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in ('.py', '.json'))
    return hashlib.sha256(b'\0'.join(path.read_bytes() for path in files)).hexdigest()[:12]


def _is_tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and triton._is_tf32_allowed()


def _read() -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):  # there is none, or it is damaged
        verdicts = json.loads(cache_file().read_text())
        if isinstance(verdicts, dict):
            return verdicts
    return {}


def keep(verdicts: dict[str, str]) -> None:
    """Add faults, or '' for none, to the file, whole or not at all; nothing happens if it cannot be written."""
    with contextlib.suppress(OSError):
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache_file(), json.dumps(_read() | verdicts, indent=1))


def check(device: torch.device, dtype: torch.dtype, head_dim: int | None, one_tile: bool) -> str:
    """Tell what is wrong with the kernels in shifted and padded windows of one or several tiles, or '' if nothing is.

    Without a head size, with those of the post-norm.
    """
    if head_dim is None:
        return examine_post_norm(dtype, device)[1]
    return examine(WINDOWS[one_tile], True, head_dim, dtype, device)[1]


def examine_post_norm(dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Deviation], str]:
    """Compare the kernels of the post-norm with PyTorch's operators; results as of `examine`."""
    return _judge(lambda: {k: Deviation(*pair) for k, pair in post_norm.check(device, dtype).items()}, 'in post-norm')


def examine(
    window: Size, is_shifted: bool, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Deviation], str]:
    """Compare the kernels with the reference on a small feature map, shifted and padded or neither.

    Returns:
        The deviation of each result, and what is wrong with them, or ''.

    Raises:
        NotCheckedError: The comparison failed for another reason, such as too little memory.
    """
    compare = functools.partial(_compare, window, is_shifted, head_dim, dtype, device)
    return _judge(compare, f'in windows of {"x".join(map(str, window))}')


def _judge(compare: Callable[[], dict[str, Deviation]], where: str) -> tuple[dict[str, Deviation], str]:
    try:
        deviations = compare()
    except Exception as error:
        fault = f'{where}: {type(error).__name__}: {" ".join(str(error).split())[:300]}'
        if isinstance(error, importlib.import_module('triton').TritonError):  # of the compiler
            return {}, fault
        raise NotCheckedError(fault) from error
    # NaN is not allowed
    faults = ', '.join(f'{name} is off by {d}' for name, d in deviations.items() if not d.error <= d.allowed)
    return deviations, f'{where}: {faults}' if faults else ''


def _compare(
    window: Size, is_shifted: bool, head_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Deviation]:
    """Errors against the reference in float64; allowed is three times that of `sdpa` in the same dtype, plus rounding.

    Inputs are drawn by a generator of their own.
    """
    peer_dtype = torch.float16 if _is_tf32(dtype) else dtype  # TF32 has as many bits
    is_exact = peer_dtype == torch.float32
    shift = tuple(w // 2 if is_shifted else 0 for w in window)
    # shifted: a window inside the feature map, windows at its edges, and some whose first tokens are all padding
    size = tuple(w + d for w, d in zip(window, shift, strict=True)) if is_shifted else (*window[:-1], 2 * window[-1])
    generator = torch.Generator().manual_seed(0)
    qkv, grad = (torch.randn(s, generator=generator) for s in ((1, *size, 3, 2, head_dim), (1, *size, 2 * head_dim)))
    table = 16 * torch.rand(2, math.prod(2 * w - 1 for w in window), generator=generator)
    # beyond 10, rounding of the weights takes the gradients away in half precision
    scale = torch.tensor([10.0, 90.0 if is_exact else 3.0]).log().view(2, 1, 1)
    inputs = [t.to(device) for t in (qkv.to(peer_dtype), scale, table, grad.to(peer_dtype))]

    _compile(inputs, window, shift, dtype)
    exact = _results(reference_window_attention, inputs, window, shift, torch.float64)
    peer = _results(sdpa_window_attention, inputs, window, shift, peer_dtype)
    ours = _results(triton.triton_window_attention, inputs, window, shift, dtype)
    deviations = {}
    for name, expected, *found in zip(RESULTS, exact, peer, ours, strict=True):
        peer_error, error = (float((t.double() - expected).abs().max() / expected.abs().max()) for t in found)
        peer_error = peer_error if math.isfinite(peer_error) else 0.0  # PyTorch's fused kernels sometimes return NaN
        deviations[name] = Deviation(error, allowed_error(name, peer_error, peer_dtype))
    return deviations


def allowed_error(name: str, peer_error: float, dtype: torch.dtype) -> float:
    """How far a result may be off if `sdpa` is off by `peer_error`, both as parts of the largest value.

    That is three times as far, and what rounding explains, in case the error of `sdpa` happens to be small.
    """
    rounding = ROUNDING[dtype]
    if name == 'grad of logit_scale':  # a sum over tokens of q * grad_q, which cancels for the most part
        rounding = 1e-4 if dtype == torch.float32 else 0.03
    return 3 * peer_error + rounding


def _compile(inputs: list[Tensor], window: Size, shift: Size, dtype: torch.dtype) -> None:
    """Compile the kernels of both passes in parallel; one that cannot be compiled raises its error when it runs."""
    qkv, scale, table, grad = inputs
    qkv, grad = qkv.to(dtype), grad.to(dtype)
    with recorded() as launches:
        out, lse = triton.triton_forward(qkv, scale, table, window, shift)
        triton.triton_backward(grad, qkv, scale, table, out, lse, window, shift)
    different = {(launch.kernel, *launch.constants.items()): launch for launch in launches}
    compile_launches(different.values())


def _results(
    attention: Callable[..., Tensor], inputs: list[Tensor], window: Size, shift: Size, dtype: torch.dtype
) -> list[Tensor]:
    """`RESULTS` with the feature map in `dtype`; scale and table stay in float32, as parameters do, or are float64."""
    *inputs, grad = inputs
    kinds = dtype, *[torch.promote_types(dtype, torch.float32)] * 2
    inputs = [t.to(kind, copy=True).requires_grad_() for t, kind in zip(inputs, kinds, strict=True)]
    out = attention(*inputs, window, shift, sequential=True)
    out.backward(grad.to(dtype))
    return [out.detach(), *(t.grad for t in inputs)]
