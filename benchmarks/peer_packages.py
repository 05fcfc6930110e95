"""The folder of timm and transformers, kept out of the environment because mmdet imports any transformers."""

import sys
from pathlib import Path

FOLDER = str(Path(sys.prefix, 'oracles'))


def add_to_path() -> None:
    """Make the packages importable from now on."""
    if FOLDER not in sys.path:
        sys.path.append(FOLDER)
