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


_recorders: list[list[Launch]] = []


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Run so many programs of a kernel on the device of its first argument."""
    if _recorders:
        _recorders[-1].append(Launch(kernel, programs, args, constants))
    elif programs:
        with torch.cuda.device_of(args[0]):
            kernel[(programs,)](*args, **constants)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; the tensors may be on the meta device."""
    _recorders.append([])
    try:
        yield _recorders[-1]
    finally:
        _recorders.pop()
