"""How the command line tools report wrong input. Imports only the standard library."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def one_line_errors(*errors: type[Exception]) -> Iterator[None]:
    """Turn these exceptions into a line `error: ...`, printed by rank 0, and exit code 2."""
    try:
        yield
    except errors as error:
        if rank() == 0:
            print(f'error: {error}', file=sys.stderr, flush=True)
        sys.exit(2)


def check_outputs(*paths: str | Path | None) -> None:
    """Check before a long computation that its results can be written; None is skipped.

    Raises:
        OSError: One of the files cannot be written.
    """
    for path in (Path(path) for path in paths if path):
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f'there is no folder {path.parent} for {path.name}: make it, or name another file')
        if path.is_dir():
            raise IsADirectoryError(f'{path} is a folder: name a file in it')
        try:
            with tempfile.TemporaryFile(dir=path.parent):  # results are written to a new file, which replaces the old
                pass
        except OSError as error:
            raise OSError(f'{path} cannot be written: {error.strerror}; name another file') from error


def rank() -> int:
    """Rank of this process in the run that a launcher has started; 0 without one."""
    names = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    return int(next((os.environ[name] for name in names if name in os.environ), 0))
