"""Files that are written whole or not at all."""

import os
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file so that whoever reads it meanwhile, or after a crash, finds the former or the new text.

    Raises:
        OSError: It cannot be written.
    """
    part = Path(f'{path}.{os.getpid()}.part')
    part.write_text(text)
    part.replace(path)
