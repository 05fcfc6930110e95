"""Compile the Triton kernels of the post-norm residual for GPUs of Nvidia, without one.

python tests/compile_post_norm.py    # prints registers, spills and shared memory of each kernel as a table
"""

import os

os.environ.pop('TRITON_INTERPRET', None)
import torch
import triton
from compile_kernels import TYPES, resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from swinv2_mm.ops.triton import post_norm
from swinv2_mm.ops.triton.launch import Launch, recorded

CAPABILITIES = 80, 90
CHANNELS = 96, 128, 352, 1000, 4096
DTYPES = [  # of the main branch and the weights, and of the residual branch
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
]
OPTIONS = 'num_warps', 'enable_fp_fusion'


def launches(
    tokens: int, channels: int, dtype: torch.dtype, branch_dtype: torch.dtype, kept: torch.Tensor | None
) -> list[Launch]:
    """What runs for maps of two samples, forward and backward."""
    x = torch.empty(2, tokens, channels, dtype=dtype, device='meta')
    weight = torch.empty(channels, dtype=dtype, device='meta')
    branch = torch.empty_like(x, dtype=branch_dtype)
    with recorded() as found:
        out, statistics = post_norm.forward(x, branch, weight, weight, kept, 0.9, 1e-5)
        post_norm.backward(out, branch, weight, kept, statistics, 0.9)
    return found


def compile_launch(launch: Launch, capability: int) -> triton.compiler.CompiledKernel:
    """The kernel of a launch, compiled for the types of its arguments."""
    constants = {name: value for name, value in launch.constants.items() if name not in OPTIONS}
    options = {name: launch.constants[name] for name in OPTIONS}
    signature, attributes, known = {}, {}, {}
    for place, (name, value) in enumerate(
        zip(launch.kernel.arg_names, (*launch.args, *constants.values()), strict=True)
    ):
        if isinstance(value, torch.Tensor):
            signature[name], attributes[place,] = f'*{TYPES[value.dtype]}', [['tt.divisibility', 16]]
        elif name in constants or value is None or value == 1:  # as when a kernel is called
            signature[name], known[place,] = 'constexpr', value
        else:
            signature[name] = 'fp32' if isinstance(value, float) else 'i32'
    source = ASTSource(launch.kernel, signature, known, attributes)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)


def main() -> None:
    """Run the script."""
    print('| compute capability | channels | types | kernel | registers | bytes on the stack | shared memory |')
    print('|---|---|---|---|---|---|---|')
    cases = [(56 * 56, c, *dtypes, True) for c in CHANNELS for dtypes in DTYPES] + [(1, 128, *DTYPES[0], False)]
    for tokens, channels, *dtypes, is_dropped in cases:
        kept = torch.empty(2, dtype=dtypes[0], device='meta') if is_dropped else None
        for launch in launches(tokens, channels, *dtypes, kept):
            for capability in CAPABILITIES:
                compiled = compile_launch(launch, capability)
                used = f'{resources(compiled.asm["cubin"])} | {compiled.metadata.shared}'
                names = ' + '.join(TYPES[dtype] for dtype in dtypes)
                print(f'| {capability} | {channels} | {names} | {launch.kernel.__name__} | {used} |', flush=True)


if __name__ == '__main__':
    main()
