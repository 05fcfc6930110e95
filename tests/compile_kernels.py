"""Compile the Triton kernels for a GPU of Nvidia, without one: what the interpreter accepts need not compile.

python tests/compile_kernels.py    # prints registers, spills and shared memory of each kernel as a table
"""

import argparse
import os
import re
import subprocess
import tempfile

os.environ.pop('TRITON_INTERPRET', None)
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from swinv2_mm.ops.triton import attention as triton_backend
from swinv2_mm.ops.triton import kernels

TARGET = GPUTarget('cuda', 90, 32)
TYPES = {torch.float32: 'fp32', torch.float16: 'fp16', torch.bfloat16: 'bf16'}
CASES = [
    ((8, 8), 32, torch.bfloat16),
    ((7, 7), 32, torch.float16),
    ((24, 24), 32, torch.bfloat16),
    ((24, 24), 32, torch.float32),
    ((64, 64), 32, torch.bfloat16),
    ((8, 7, 7), 32, torch.bfloat16),
    ((16, 16), 128, torch.bfloat16),
    ((16, 16), 16, torch.float16),
]
# All kernels, types, and numbers of axes; heads of each size of tiles, and large ones in windows that else are one tile
FEW = [
    ((7, 7), 16, torch.float16),
    ((24, 24), 32, torch.float32),
    ((8, 7, 7), 128, torch.bfloat16),
    *(((8, 8), head_dim, dtype) for head_dim in (96, 128) for dtype in (torch.float32, torch.bfloat16)),
]
MAPS = {'qkv', 'out', 'grad_out', 'grad_qkv'}
NUMBERS = {'heads', 'windows', 'splits'}


def shifted_windows(window: tuple[int, ...], head_dim: int, dtype: torch.dtype) -> triton_backend.Geometry:
    """Windows of a map that they do not divide."""
    qkv = torch.empty(1, *(2 * w + 1 for w in window), 3, 4, head_dim, dtype=dtype)
    return triton_backend.Geometry(qkv, window, tuple(w // 2 for w in window))


def compile_kernel(name: str, geometry: triton_backend.Geometry) -> triton.compiler.CompiledKernel:
    """A kernel, compiled for such windows."""
    constants = geometry.boxes(name)[2] if name == 'grad_bias' else geometry.runs(name)[1]
    options = {key: constants.pop(key) for key in ('num_warps', 'num_stages', 'enable_fp_fusion')}
    function = getattr(kernels, name)
    signature, attributes, known = {}, {}, {}
    for place, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = 'constexpr'
            known[(place,)] = constants[argument]
        elif argument == 'size':  # a number that is 1 becomes a constant when the kernel is called
            signature[argument] = tuple('constexpr' if n == 1 else 'i32' for n in geometry.size)
            known |= {(place, axis): 1 for axis, n in enumerate(geometry.size) if n == 1}
        elif argument in NUMBERS:
            signature[argument] = 'i32'
        else:
            signature[argument] = '*' + (TYPES[geometry.dtype] if argument in MAPS else 'fp32')
            attributes[(place,)] = [['tt.divisibility', 16]]
    return triton.compile(ASTSource(function, signature, known, attributes), target=TARGET, options=options)


def resources(cubin: bytes) -> str:
    """Registers and spilled bytes of a thread, as the disassembler of the wheel tells them."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, '-res-usage', file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', text).groups()
    return f'{registers} | {stack}'


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--few', action='store_true', help='a few cases, which have all kernels and types')
    cases = FEW if parser.parse_args().few else CASES
    print('| window | head size | type | kernel | warps | registers | bytes on the stack | shared memory |')
    print('|---|---|---|---|---|---|---|---|')
    for window, head_dim, dtype in cases:
        geometry = shifted_windows(window, head_dim, dtype)
        for name in geometry.kernels():
            compiled = compile_kernel(name, geometry)
            used = f'{compiled.metadata.num_warps} | {resources(compiled.asm["cubin"])} | {compiled.metadata.shared}'
            print(f'| {"x".join(map(str, window))} | {head_dim} | {TYPES[dtype]} | {name} | {used} |', flush=True)


if __name__ == '__main__':
    main()
