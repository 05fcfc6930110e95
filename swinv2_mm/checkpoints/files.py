"""Reading checkpoint files as data: nothing that a file contains is ever executed."""

import ast
import contextlib
import io
import logging
import pickle
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from mmengine.logging import print_log
from safetensors.torch import load_file

from .. import compat
from .errors import CheckpointError, UnsafeCheckpointError

FOLDER_WEIGHTS = 'weights.pth'  # in a checkpoint that is a folder, see `engine.deepspeed`
ZIP, PICKLE = b'PK\x03\x04', b'\x80'  # how files of `torch.save` begin, since and before torch 1.6
# what else is found under the name of a checkpoint
NO_CHECKPOINTS = {
    b'version https://git-lfs': 'a Git LFS pointer instead of the file; get that with `git lfs pull`',
    b'<': 'a web page: the download failed, or the address was that of a page',
    b'{': 'a JSON file',
}
# bytes of an element, by the class that a file names for a storage
ITEM_SIZES = {
    **dict.fromkeys(('DoubleStorage', 'LongStorage', 'ComplexFloatStorage'), 8),
    **dict.fromkeys(('FloatStorage', 'IntStorage'), 4),
    **dict.fromkeys(('HalfStorage', 'BFloat16Storage', 'ShortStorage'), 2),
    **dict.fromkeys(('CharStorage', 'ByteStorage', 'BoolStorage', 'UntypedStorage'), 1),
    'ComplexDoubleStorage': 16,
}
WAY_OUT = (
    'Nothing in it was executed. If you trust its author, take the weights out of it once: '
    'python tools/model_converters/swinv2_to_mm.py SRC DST --trust, or load_swinv2_state_dict(path, trust=True); for '
    'a class of your own that a training stored, call torch.serialization.add_safe_globals([YourClass]) in its config'
)


def read_checkpoint(path: str | Path, map_location: Any = None, trust: bool = False) -> Any:
    """Read a file of `torch.save` or safetensors without executing anything in it.

    A folder stands for the file with the weights in it, if it is one that this package's DeepSpeedStrategy has written.

    Tensors are mapped into memory instead of read where the format allows it, except in the state of a training, which
    outlives the file. The checksums in a file of `torch.save` are verified; safetensors and files from before torch 1.6
    have none.

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
    with _errors_name(path):
        if head[8:9] == b'{':
            return load_file(path)
        if not head.startswith((ZIP, PICKLE)):
            raise CheckpointError(_describe(head))
        if head.startswith(ZIP):
            _verify_records(path)
        mmap = head.startswith(ZIP) and not _is_of_training(_unpickle(path, 'cpu', trust, mmap=True))
        checkpoint = _unpickle(path, map_location, trust, mmap)
        if not trust:
            _check_configs(checkpoint)
    return checkpoint


def _unpickle(path: Path, map_location: Any, trust: bool, mmap: bool) -> Any:
    if trust:
        return torch.load(str(path), map_location=map_location, mmap=mmap, weights_only=False)
    return compat.load_data(str(path), map_location, mmap)


def _is_of_training(checkpoint: Any) -> bool:
    """Whether tensors of a checkpoint outlive it: an optimizer keeps those that it is given.

    Then they may not be mapped from the file, since the next checkpoint may overwrite it.
    """
    return isinstance(checkpoint, dict) and 'optimizer' in checkpoint


def _describe(head: bytes) -> str:
    if not head:
        return 'it is empty'
    kinds = (kind for start, kind in NO_CHECKPOINTS.items() if head.lstrip().startswith(start))
    return f'it is {next(kinds, "neither a file of torch.save nor safetensors")}'


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Name the file in every error, and the class in the one about code: damaged files raise almost anything."""
    try:
        yield
    except CheckpointError as error:
        way_out = f'. {WAY_OUT}' if isinstance(error, UnsafeCheckpointError) else ''
        raise type(error)(f'checkpoint {path} is refused: {error}{way_out}') from None
    except pickle.UnpicklingError as error:
        names = _refused_names(path, str(error))
        if names:
            raise UnsafeCheckpointError(
                f'checkpoint {path} is refused: it holds more than data, namely {", ".join(names)}. {WAY_OUT}'
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


def _verify_records(path: Path) -> None:
    """Compare every record of a zip file with its checksum, and with the size of its tensor; `torch.load` does neither.

    Raises:
        BadZipFile: A checksum is wrong.
        CheckpointError: A record is shorter than its tensor, which would then show what follows in the file; or two
            have the same name.
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            with archive.open(record) as file:
                while file.read(1 << 20):
                    pass
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise CheckpointError('it has several records of the same name')
        sizes = {record.filename.split('/', 1)[-1]: record.file_size for record in archive.infolist()}
        for key, size in _inspect(path).storages.items():
            if sizes.get(f'data/{key}') != size:
                raise CheckpointError(f'a tensor needs {size} bytes, its record has {sizes.get(f"data/{key}", 0)}')


# ---------------------------------------------------------------- code in checkpoints


class _Inert:
    """Stands for whatever a pickle wants to make or call, and does nothing."""

    def __init__(self, *args):
        pass

    def _ignore(self, *args):
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Inspector(pickle.Unpickler):
    """Walks through a pickle without making what it describes; remembers the names that it uses, and its storages."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.names: set[str] = set()
        self.storages: dict[str, int] = {}  # bytes by key

    def find_class(self, module: str, name: str) -> type:
        """Take the name for nothing but a name."""
        self.names.add(f'{IMPORT_MAPPING.get(module, module)}.{name}')  # torch.save writes the names of Python 2
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> _Inert:
        """Remember the size of a storage; torch names them ('storage', class, key, device, number of elements)."""
        if isinstance(pid, tuple) and len(pid) == 5 and pid[1].__name__ in ITEM_SIZES:
            self.storages[pid[2]] = ITEM_SIZES[pid[1].__name__] * pid[4]
        return _Inert()


def _inspect(path: Path) -> _Inspector:
    """Look into the pickles of a file, as far as they can be read."""
    with path.open('rb') as file:
        if file.read(len(ZIP)) == ZIP:
            with zipfile.ZipFile(path) as archive:
                pickled = next((name for name in archive.namelist() if name.endswith('data.pkl')), None)
                file = io.BytesIO(archive.read(pickled) if pickled else b'')
        else:
            file.seek(0)
        inspector = _Inspector(file)
        # damaged ones raise almost anything; what has been seen until then counts
        with contextlib.suppress(Exception):
            while True:  # older files are several pickles in a row, and then raw data
                inspector.load()
    return inspector


def _refused_names(path: Path, message: str) -> list[str]:
    """Classes and functions that a pickle asks for and that are no data."""
    named = re.findall(r'GLOBAL ([\w.]+)', message)
    # the `getattr` of mmengine's logs is data, any other is not, and which one it was, a pickle does not tell by name
    return named or sorted(_inspect(path).names - (compat.data_globals().keys() - {'builtins.getattr'}))


# where Runners store the text of their config; mmengine executes it as Python when it resumes, and in inferencers
CONFIG_TEXTS = (('meta', 'config'), ('meta', 'cfg'), ('message_hub', 'runtime_info', 'cfg'))


def _check_configs(checkpoint: Any) -> None:
    """Refuse a training config that is more than data, and take out one that would import modules not imported so far.

    Raises:
        UnsafeCheckpointError: A config is more than data; the message shows where.
    """
    for *parents, key in CONFIG_TEXTS:
        holder = checkpoint
        for parent in parents:
            holder = holder.get(parent) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or not isinstance(holder.get(key), str):
            continue
        strangers = [module for module in _config_imports(holder[key]) if module not in sys.modules]
        if strangers:
            del holder[key]
            print_log(
                f'Left the training config out of the checkpoint: it would import {", ".join(strangers)}. Import that '
                'first if you need it.',
                logger='current',
                level=logging.WARNING,
            )


def _config_imports(text: str) -> list[str]:
    """Check that the text of a config is data, and return the modules that it lets mmengine import.

    Raises:
        UnsafeCheckpointError: It is not.
    """
    if '{{' in text:  # mmengine replaces templates before it executes, so that other text than this would run
        raise UnsafeCheckpointError('its config holds a template, "{{"')
    try:
        statements = ast.parse(text).body
    except SyntaxError:
        return []  # nor can it be executed
    imports = []
    for statement in statements:
        is_assignment = isinstance(statement, ast.Assign) and all(isinstance(t, ast.Name) for t in statement.targets)
        if not is_assignment or not all(map(_is_plain, ast.walk(statement.value))):
            raise UnsafeCheckpointError(f'its config holds code, in line {statement.lineno}: {ast.unparse(statement)}')
        names = {target.id for target in statement.targets}
        if '_base_' in names:
            raise UnsafeCheckpointError(f'its config would execute another file: {ast.unparse(statement)}')
        if 'custom_imports' in names:
            imports += [node.value for node in ast.walk(statement.value) if isinstance(node, ast.Constant)]
    return [name for name in imports if isinstance(name, str)]


def _is_plain(node: ast.AST) -> bool:
    """Whether a node occurs in what mmengine writes: literals, and calls of `dict` with keywords or a literal dict.

    The latter stands for a dict with a key that is no keyword, such as `custom_keys={'backbone.norm': ...}`.
    """
    if isinstance(node, ast.Call):
        literal = all(isinstance(argument, ast.Dict) for argument in node.args)
        return isinstance(node.func, ast.Name) and node.func.id == 'dict' and literal
    if isinstance(node, ast.Name):
        return node.id in ('dict', 'inf', 'nan')
    literals = (
        ast.Constant,
        ast.Dict,
        ast.List,
        ast.Tuple,
        ast.Set,
        ast.keyword,
        ast.UnaryOp,
        ast.USub,
        ast.expr_context,
    )
    return isinstance(node, literals)
