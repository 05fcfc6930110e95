"""Launch kernels, or record what would be launched: the compiler needs no GPU, and shapes need no memory."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A kernel and what it is called with."""

    kernel: Any
    programs: int
    args: tuple
    constants: dict[str, Any]  # what it is compiled for, `num_warps` and `num_stages` among it


_recorders: list[tuple[list[Launch], bool]] = []  # and whether what is recorded runs too


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Run so many programs of a kernel on the device of its first argument."""
    runs = True
    if _recorders:
        launches, runs = _recorders[-1]
        launches.append(Launch(kernel, programs, args, constants))
    if runs and programs:
        with torch.cuda.device_of(args[0]):
            kernel[(programs,)](*args, **constants)


@contextlib.contextmanager
def recorded(run: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches of all threads, and `run` them or not: without, tensors may be on the meta device."""
    launches: list[Launch] = []
    _recorders.append((launches, run))
    try:
        yield launches
    finally:
        _recorders.pop()
