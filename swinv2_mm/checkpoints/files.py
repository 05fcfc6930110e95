"""A checkpoint file -> the object in it, read as data: nothing that the file contains is executed."""

import contextlib
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .. import compat
from . import CheckpointError, UnsafeCheckpointError
from .pickles import ZIP, check_configs, refused_names, storage_sizes

FOLDER_WEIGHTS = 'weights.pth'  # in a checkpoint that is a folder, see `parallel.deepspeed`
PICKLE = b'\x80'  # first byte of files of `torch.save` before torch 1.6
# first bytes of files that often have the name of a checkpoint and are none
OTHER_KINDS = {
    b'version https://git-lfs': 'a Git LFS pointer instead of the file; get that with `git lfs pull`',
    b'<': 'a web page: the download failed, or the address was that of a page',
    b'{': 'a JSON file',
}
HINT = (
    'Nothing in it was executed. If you trust its author, take the weights out of it once: '
    'python tools/model_converters/swinv2_to_mm.py SRC DST --trust, or load_swinv2_state_dict(path, trust=True); for '
    'a class of your own that a training stored, call torch.serialization.add_safe_globals([YourClass]) in its config'
)


def read_checkpoint(path: str | Path, map_location: Any = None, trust: bool = False) -> Any:
    """Read a file of `torch.save` or safetensors without executing anything in it.

    Of a folder that this package's DeepSpeedStrategy has written, the file with the weights is read.

    Tensors are memory-mapped where the format allows it, except in a training state, which outlives the file. The
    checksums in a file of `torch.save` are verified; safetensors and files from before torch 1.6 have none.

    Args:
        path: Local file or folder.
        map_location: As in `torch.load`; safetensors stay on the CPU.
        trust: Whether the file may execute code, as in `torch.load(weights_only=False)`.

    Raises:
        FileNotFoundError: There is no such file.
        UnsafeCheckpointError: The file would execute code; the message names what it asks for.
        CheckpointError: The file is damaged, or no checkpoint.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    if path.is_dir() and (path / FOLDER_WEIGHTS).is_file():
        path = path / FOLDER_WEIGHTS
    if path.is_dir():
        raise CheckpointError(f'checkpoint {path} is a folder; pass the file in it')
    with path.open('rb') as file:
        head = file.read(64)
    with _named_errors(path):
        if head[8:9] == b'{':
            return load_file(path)
        if not head.startswith((ZIP, PICKLE)):
            raise CheckpointError(_describe(head))
        if head.startswith(ZIP):
            _verify_zip(path)
        mmap = head.startswith(ZIP) and not _is_training_state(_unpickle(path, 'cpu', trust, mmap=True))
        checkpoint = _unpickle(path, map_location, trust, mmap)
        if not trust:
            check_configs(checkpoint)
    return checkpoint


def _verify_zip(path: Path) -> None:
    """Verify the checksum of every record, and that it is as large as its tensor; `torch.load` does neither.

    Raises:
        BadZipFile: A checksum is wrong.
        CheckpointError: A record is shorter than its tensor, which would then include what follows in the file; or two
            records have the same name.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise CheckpointError('it has several records of the same name')
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f'the header or checksum of record {damaged!r} is wrong')
        sizes = {record.filename.split('/', 1)[-1]: record.file_size for record in archive.infolist()}
    for key, size in storage_sizes(path).items():
        if sizes.get(f'data/{key}') != size:
            raise CheckpointError(f'a tensor needs {size} bytes, its record has {sizes.get(f"data/{key}", 0)}')


def _unpickle(path: Path, map_location: Any, trust: bool, mmap: bool) -> Any:
    if trust:
        return torch.load(str(path), map_location=map_location, mmap=mmap, weights_only=False)
    return compat.load_data(str(path), map_location, mmap)


def _is_training_state(checkpoint: Any) -> bool:
    """Whether the checkpoint has an optimizer state.

    An optimizer keeps the tensors that it loads. They must not be mapped: the next checkpoint may overwrite the file.
    """
    return isinstance(checkpoint, dict) and 'optimizer' in checkpoint


def _describe(head: bytes) -> str:
    if not head:
        return 'it is empty'
    kinds = (kind for start, kind in OTHER_KINDS.items() if head.lstrip().startswith(start))
    return f'it is {next(kinds, "neither a file of torch.save nor safetensors")}'


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged file, which may be of any type, into a CheckpointError with the path of the file."""
    try:
        yield
    except CheckpointError as error:
        hint = f'. {HINT}' if isinstance(error, UnsafeCheckpointError) else ''
        raise type(error)(f'checkpoint {path} is refused: {error}{hint}') from None
    except pickle.UnpicklingError as error:
        names = refused_names(path, str(error))
        if names:
            raise UnsafeCheckpointError(
                f'checkpoint {path} is refused: it contains more than data, namely {", ".join(names)}. {HINT}'
            ) from None
        raise CheckpointError(f'checkpoint {path} is damaged: {_first_line(error)}') from error
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise CheckpointError(
            f'checkpoint {path} is damaged or incomplete ({type(error).__name__}: {_first_line(error)}); get it again'
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else 'no details'
