"""Compile all Triton kernels for all head dimensions, and write their resource usage to a JSON file.

Tests interpret the kernels, so this runs in its own process: python tests/helpers/compile_kernels.py OUT
"""

import itertools
import json
import math
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))
import aot_compile
import kernel_report

from swinv2_mm.ops.triton import attention, post_norm
from swinv2_mm.ops.triton.launch import recorded

ARCHS = 'sm_80', 'sm_89', 'sm_90', 'sm_100'
DTYPES = torch.float32, torch.float16, torch.bfloat16
HEAD_DIMS = 16, 32, 64, 96, 128
WINDOWS = (8, 7, 7), (8, 8)  # several tiles, and one tile
CHANNELS = 96, 128, 352, 1000, 4096
POST_NORM_DTYPES = (  # main branch and weights, residual branch
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
)


def jobs_of(window: tuple[int, ...], head_dim: int, dtype: torch.dtype, arch: str) -> dict[str, aot_compile.Job]:
    """The kernels of shifted windows, by name, for a feature map that needs padding."""
    qkv = torch.empty(1, *(2 * w + 1 for w in window), 3, 4, head_dim, dtype=dtype, device='meta')
    table_size, shift = math.prod(2 * w - 1 for w in window), [w // 2 for w in window]
    launches = itertools.chain(*kernel_report.launches_of(qkv, table_size, window, shift))
    return {launch.kernel.__name__: aot_compile.job_of(launch, arch) for launch in launches}


def cases() -> list[tuple[torch.dtype, int, str]]:
    """The usual heads for each GPU; each dtype and head dimension for one GPU, because all for all takes minutes."""
    usual = [(torch.bfloat16, 32, arch) for arch in ARCHS]
    pairs = itertools.product(enumerate(DTYPES), enumerate(HEAD_DIMS))
    others = [(dtype, head_dim, ARCHS[(i + j) % len(ARCHS)]) for (i, dtype), (j, head_dim) in pairs]
    return [case for case in dict.fromkeys(usual + others) if case[1] <= attention.MAX_HEAD_DIM[case[0]]]


def post_norm_jobs(channels: int, dtypes: tuple[torch.dtype, torch.dtype], arch: str) -> dict[str, aot_compile.Job]:
    """The kernels of the post-norm for a main branch and a residual branch of these dtypes, by name."""
    dtype, branch_dtype = dtypes
    x, weight, kept = (torch.empty(shape, dtype=dtype, device='meta') for shape in ((2, 56, 56, channels), channels, 2))
    branch = torch.empty_like(x, dtype=branch_dtype)
    with recorded() as launches:
        out, statistics = post_norm.forward(x, branch, weight, weight, kept, 0.9, 1e-5)
        post_norm.backward(out, branch, weight, kept, statistics, 0.9)
    return {launch.kernel.__name__: aot_compile.job_of(launch, arch) for launch in launches}


def main() -> None:
    """Run the script."""
    jobs = {}
    for (i, dtypes), (j, channels) in itertools.product(enumerate(POST_NORM_DTYPES), enumerate(CHANNELS)):
        arch = ARCHS[(i + j) % len(ARCHS)]
        of_case = post_norm_jobs(channels, dtypes, arch)
        jobs |= {(name, ' + '.join(map(str, dtypes)), channels, arch): job for name, job in of_case.items()}
    for dtype, head_dim, arch in cases():
        several, one = (jobs_of(window, head_dim, dtype, arch) for window in WINDOWS)
        jobs |= {(name, str(dtype), head_dim, arch): job for name, job in {**one, **several}.items()}
    compiled = aot_compile.compile_all(jobs.values(), os.cpu_count())
    found = []
    for case, job in jobs.items():
        kernel = compiled[job]
        fitting = aot_compile.programs_per_sm(job.arch, kernel.registers, kernel.shared, kernel.warps)
        found.append([*case, dict(stack=kernel.stack, shared=kernel.shared, programs_per_sm=fitting)])
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == '__main__':
    main()
