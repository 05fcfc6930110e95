"""Launch kernels, or record what would be launched: the compiler needs no GPU, and shapes need no memory."""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A kernel and what it is called with."""

    kernel: Any
    programs: int
    args: tuple
    constants: dict[str, Any]  # what it is compiled for, `num_warps` and `num_stages` among it


class _Recorders(threading.local):
    """Of a thread: lists of launches, and whether what is recorded runs too."""

    def __init__(self) -> None:
        self.stack: list[tuple[list[Launch], bool]] = []


_recorders = _Recorders()


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Run so many programs of a kernel on the device of its first argument."""
    runs = True
    if _recorders.stack:
        launches, runs = _recorders.stack[-1]
        launches.append(Launch(kernel, programs, args, constants))
    if runs and programs:
        with torch.cuda.device_of(args[0]):
            kernel[(programs,)](*args, **constants)


@contextlib.contextmanager
def recorded(run: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches of this thread, and `run` them or not: without, tensors may be on the meta device.

    Autograd goes through the backward pass of a GPU in another thread.
    """
    launches: list[Launch] = []
    _recorders.stack.append((launches, run))
    try:
        yield launches
    finally:
        _recorders.stack.pop()


def compile_launches(launches: Iterable[Launch]) -> list[Any]:
    """Compile each kernel for what it is called with, in parallel, so that it can be launched without a delay.

    Returns:
        What Triton has compiled for each launch, or its error; None in Triton's interpreter.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler runs without Python's lock
        return list(pool.map(_compile, launches))


def _compile(launch: Launch) -> Any:
    kernel, programs, args, constants = launch
    try:
        with torch.cuda.device_of(args[0]):  # each thread has a current device of its own
            return kernel.warmup(*args, grid=(programs,), **constants)
    except Exception as error:  # of Triton, LLVM, the assembler or the driver
        return error
