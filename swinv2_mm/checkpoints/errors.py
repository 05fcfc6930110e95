"""What is wrong with a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint holds more than data; nothing in it was executed."""


@contextmanager
def in_file(path: str | Path | None) -> Iterator[None]:
    """Name the file in errors about its content."""
    try:
        yield
    except CheckpointError as error:
        raise (type(error)(f'checkpoint {path} cannot be loaded: {error}') if path else error) from None
