"""Time, peak memory, profile and peak FLOP/s on the device at hand."""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.benchmark import Measurement, TaskSpec, timer

from swinv2_mm.cli.memory import resident

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
MIB = 2**20
DENSE_PEAKS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12}  # FLOP/s in half precision, by part of the GPU's name
GEMM = 2048  # rows and columns of the matrix product that measures the peak of other devices
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3), in bytes


# ---------------------------------------------------------------- time


def time_interleaved(steps: Sequence[Callable[[], object]], rounds: int) -> list[Measurement]:
    """Time steps in turns: each round runs every step once, so that a machine that slows down slows all of them.

    `Timer.timeit` would add two untimed runs to every timed one. Its clock, `timer`, waits for the GPU.
    """
    seconds = [[] for _ in steps]
    for _ in range(rounds):
        for times, step in zip(seconds, steps, strict=True):
            start = timer()
            step()
            times.append(timer() - start)
    return [Measurement(1, times, TaskSpec('step()', '')) for times in seconds]


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a short call on the GPU, with a cold L2 cache; without a GPU, of a single call."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(call, warmup=20, rep=100, return_mode='median')
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    a = torch.randn(GEMM, GEMM, device=DEVICE, dtype=dtype)
    (product,) = time_interleaved([lambda: a @ a], 10)
    return 2 * GEMM**3 / statistics.median(product.times[3:])  # the first three warm up


def device_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the device: by the data sheet for a known GPU in half precision, else of a large matrix product.

    For a CPU it is that of float32.
    """
    if DEVICE == 'cpu':
        return gemm_rate(torch.float32)
    known = [peak for part, peak in DENSE_PEAKS.items() if part in torch.cuda.get_device_name()]
    return known[0] if known and dtype != torch.float32 else gemm_rate(dtype)


def profile_operators(step: Callable[[], object]) -> dict[str, float]:
    """Seconds of a step in each PyTorch operator on a CPU, or in each kernel on a GPU; the largest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        timer()  # waits for the GPU
    attribute = 'self_device_time_total' if DEVICE == 'cuda' else 'self_cpu_time_total'
    seconds = {event.key: 1e-6 * getattr(event, attribute) for event in profile.key_averages()}
    return {name: value for name, value in sorted(seconds.items(), key=lambda item: -item[1]) if value}


# ---------------------------------------------------------------- memory


def peak_memory(step: Callable[[], object]) -> int:
    """Peak memory of a step in bytes, without what is allocated before it.

    On a GPU that of tensors; on a CPU the resident pages of the process (Linux only).
    """
    if DEVICE == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL('libc.so.6').malloc_trim(0)  # else the step would reuse what was freed but not returned
    Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM (proc(5))
    before = resident('VmRSS')
    step()
    return resident('VmHWM') - before


@contextlib.contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Make the C library return memory to the system as soon as it is freed inside.

    Otherwise the steps to be measured would reuse the large heap of the reference, without the page faults that they
    cost in a process of their own. Afterwards the thresholds are those at which the library's own adaptation to a
    program of large blocks ends (mallopt(3)).
    """
    if DEVICE == 'cuda':
        yield
        return
    libc = ctypes.CDLL('libc.so.6')
    libc.mallopt(M_MMAP_THRESHOLD, 2**22)
    try:
        yield
    finally:
        libc.malloc_trim(0)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)


def available_memory() -> int:
    """Bytes that can still be allocated, on the GPU if there is one."""
    if DEVICE == 'cuda':
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return 1024 * int(Path('/proc/meminfo').read_text().split('MemAvailable:')[1].split()[0])
