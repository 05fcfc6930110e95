"""How the command line tools report wrong input. Needs Python alone."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def one_line_errors(*errors: type[Exception]) -> Iterator[None]:
    """Turn the given exceptions into `error: ...`, printed by the first process alone, and exit code 2."""
    try:
        yield
    except errors as error:
        if rank() == 0:
            print(f'error: {error}', file=sys.stderr, flush=True)
        sys.exit(2)


def rank() -> int:
    """Rank of this process in the run that a launcher has started; 0 without one."""
    names = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    return int(next((os.environ[name] for name in names if name in os.environ), 0))
