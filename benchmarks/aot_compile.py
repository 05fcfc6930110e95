"""Ahead-of-time compilation of recorded Triton launches for any GPU, without one, and their occupancy of an SM."""

import importlib
import multiprocessing
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import sass
import torch
from torch import Tensor

from swinv2_mm.ops.triton.launch import Launch

# Triton's names
TYPES = {torch.float32: 'fp32', torch.float16: 'fp16', torch.bfloat16: 'bf16', torch.int32: 'i32', torch.int64: 'i64'}
PARTITIONS = 4  # of an SM


# ---------------------------------------------------------------- compiling


class Job(NamedTuple):
    """A kernel to compile; equal for launches that share the compiled kernel."""

    module: str
    kernel: str
    signature: tuple
    constants: tuple
    attributes: tuple
    options: tuple
    arch: str


class Kernel(NamedTuple):
    """A compiled kernel; the counts are those of `sass.count`."""

    registers: int
    stack: int
    shared: int
    warps: int
    has_products: bool
    once: Counter
    around: Counter
    loop: Counter


def specialize(value: Any) -> tuple[Any, dict, dict]:
    """Type of an argument, and its constants and attributes at compile time, by index in a tuple.

    As in Triton's JIT: 1 is a constant, and multiples of 16 have the attribute `tt.divisibility`.
    """
    if isinstance(value, tuple):
        parts = [specialize(v) for v in value]
        constants, attributes = (
            {(i, *place): known for i, part in enumerate(parts) for place, known in part[n].items()} for n in (1, 2)
        )
        return tuple(part[0] for part in parts), constants, attributes
    divisible = {(): (('tt.divisibility', 16),)}
    if isinstance(value, Tensor):
        return f'*{TYPES[value.dtype]}', {}, divisible if value.data_ptr() % 16 == 0 else {}
    if isinstance(value, (bool, float)):
        return 'u1' if isinstance(value, bool) else 'fp32', {}, {}
    if value == 1:
        return 'constexpr', {(): 1}, {}
    return 'i32' if -(2**31) <= value < 2**31 else 'i64', {}, divisible if value % 16 == 0 else {}


def job_of(launch: Launch, arch: str) -> Job:
    """The job that compiles the kernel of a launch."""
    names, constexprs = launch.kernel.arg_names, launch.constants
    args = iter(launch.args)
    parts = [('constexpr', {(): constexprs[n]}, {}) if n in constexprs else specialize(next(args)) for n in names]
    constants, attributes = (
        tuple(((i, *place), known) for i, part in enumerate(parts) for place, known in part[n].items()) for n in (1, 2)
    )
    signature = tuple((name, part[0]) for name, part in zip(names, parts, strict=True))
    options = tuple((name, value) for name, value in constexprs.items() if name not in names)
    return Job(launch.kernel.__module__, launch.kernel.__name__, signature, constants, attributes, options, arch)


def compile_job(job: Job) -> Kernel:
    """Compile and disassemble a kernel.

    Raises:
        RuntimeError: It does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(job.module), job.kernel)
    attributes = {place: [list(attribute) for attribute in known] for place, known in job.attributes}
    source = ASTSource(function, dict(job.signature), dict(job.constants), attributes)
    target = GPUTarget('cuda', int(job.arch.removeprefix('sm_')), 32)
    try:
        compiled = triton.compile(source, target=target, options=dict(job.options))
    except Exception as error:
        raise RuntimeError(f'{job.kernel} does not compile for {job.arch}: {error}') from error
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, '-res-usage', '-sass', file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', text).groups())
    sizes = registers, stack, compiled.metadata.shared, compiled.metadata.num_warps
    return Kernel(*sizes, 'tt.dot' in compiled.asm['ttir'], *map(sass.count, sass.split(sass.parse(text))))


def compile_all(jobs: Iterable[Job], processes: int) -> dict[Job, Kernel]:
    """Compile each distinct job once, in `processes` processes."""
    distinct = list(dict.fromkeys(jobs))
    with ProcessPoolExecutor(processes, multiprocessing.get_context('fork')) as pool:
        return dict(zip(distinct, pool.map(compile_job, distinct), strict=True))


# ---------------------------------------------------------------- occupancy


class Limits(NamedTuple):
    """Resources of an SM, from the tables of the CUDA programming guide."""

    shared: int  # bytes
    threads: int
    programs: int
    registers: int = 65536


KIB = 1024
ARCHS = {
    'sm_80': Limits(164 * KIB, 2048, 32),
    'sm_86': Limits(100 * KIB, 1536, 16),
    'sm_89': Limits(100 * KIB, 1536, 24),
    'sm_90': Limits(228 * KIB, 2048, 32),
    'sm_100': Limits(228 * KIB, 2048, 32),
    'sm_120': Limits(100 * KIB, 1536, 24),
}
RESERVED = KIB  # shared memory that the driver reserves in each program, in bytes


def programs_per_sm(arch: str, registers: int, shared: int, warps: int) -> int:
    """Occupancy: resident programs of an SM. Registers go to warps in units of 256, warps to 4 partitions."""
    limits = ARCHS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = limits.registers // per_warp // PARTITIONS * PARTITIONS // warps
    by_shared = limits.shared // (-(-shared // 128) * 128 + RESERVED)
    return min(by_registers, by_shared, limits.threads // (32 * warps), limits.programs)
