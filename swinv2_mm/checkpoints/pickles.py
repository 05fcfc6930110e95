"""Inspection of pickles, and of the configs in them, without executing either.

`torch.load(weights_only=True)` refuses code in a pickle, but does not always name it, and does not compare tensors with
the sizes of their records; so an unpickler that creates nothing walks through the pickle here. A training config in a
checkpoint is a string to torch, but mmengine executes it as Python; so it is parsed here.
"""

import ast
import contextlib
import io
import logging
import pickle
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from pathlib import Path
from typing import IO, Any

from .. import compat
from ..openmmlab import print_log
from . import UnsafeCheckpointError

ZIP = b'PK\x03\x04'  # first bytes of files of `torch.save` since torch 1.6
# by the class of a storage
BYTES_PER_ELEMENT = {
    **dict.fromkeys(('DoubleStorage', 'LongStorage', 'ComplexFloatStorage'), 8),
    **dict.fromkeys(('FloatStorage', 'IntStorage'), 4),
    **dict.fromkeys(('HalfStorage', 'BFloat16Storage', 'ShortStorage'), 2),
    **dict.fromkeys(('CharStorage', 'ByteStorage', 'BoolStorage', 'UntypedStorage'), 1),
    'ComplexDoubleStorage': 16,
}


def storage_sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor storage that the pickle of a file describes, by the name of its record `data/NAME`."""
    return _inspect(path).storages


def refused_names(path: Path, message: str) -> list[str]:
    """Classes and functions that a pickle imports and that are not data, for the error that refuses it.

    Args:
        path: The file.
        message: Error of the restricted unpickler, which often names the first of them.
    """
    named = re.findall(r'GLOBAL ([\w.]+)', message)
    # the `getattr` of mmengine's logs is data, any other is not; the name of the function is the same
    return named or sorted(_inspect(path).names - (compat.data_globals().keys() - {'builtins.getattr'}))


class _Inert:
    """Replaces every class and function of a pickle; creating or calling it does nothing."""

    def __init__(self, *args):
        pass

    def _ignore(self, *args):
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Inspector(pickle.Unpickler):
    """Walks through a pickle without creating its objects; collects the names that it imports, and its storages."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.names: set[str] = set()
        self.storages: dict[str, int] = {}  # bytes by key

    def find_class(self, module: str, name: str) -> type:
        """Record the name, and import nothing."""
        self.names.add(f'{IMPORT_MAPPING.get(module, module)}.{name}')  # torch.save writes the names of Python 2
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> _Inert:
        """Record the size of a storage; torch identifies them ('storage', class, key, device, number of elements)."""
        if isinstance(pid, tuple) and len(pid) == 5 and pid[1].__name__ in BYTES_PER_ELEMENT:
            self.storages[pid[2]] = BYTES_PER_ELEMENT[pid[1].__name__] * pid[4]
        return _Inert()


def _inspect(path: Path) -> _Inspector:
    """Walk through the pickles of a file, as far as they can be read."""
    with path.open('rb') as file:
        if file.read(len(ZIP)) == ZIP:
            with zipfile.ZipFile(path) as archive:
                pickled = next((name for name in archive.namelist() if name.endswith('data.pkl')), None)
                file = io.BytesIO(archive.read(pickled) if pickled else b'')
        else:
            file.seek(0)
        inspector = _Inspector(file)
        # a damaged pickle may raise any exception; what was recorded before it is returned
        with contextlib.suppress(Exception):
            while True:  # older files are several pickles in a row, and then raw data
                inspector.load()
    return inspector


# where Runners store the text of their config, which mmengine executes as Python on resuming and in inferencers
CONFIG_TEXTS = (('meta', 'config'), ('meta', 'cfg'), ('message_hub', 'runtime_info', 'cfg'))


def check_configs(checkpoint: Any) -> None:
    """Refuse a training config that is more than data; delete one that would import modules not yet imported.

    Raises:
        UnsafeCheckpointError: A config is more than data; the message quotes the line.
    """
    for *parents, key in CONFIG_TEXTS:
        holder = checkpoint
        for parent in parents:
            holder = holder.get(parent) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or not isinstance(holder.get(key), str):
            continue
        unimported = [module for module in _config_imports(holder[key]) if module not in sys.modules]
        if unimported:
            del holder[key]
            print_log(
                f'Left the training config out of the checkpoint: it would import {", ".join(unimported)}. Import that '
                'first if you need it.',
                logger='current',
                level=logging.WARNING,
            )


def _config_imports(text: str) -> list[str]:
    """Check that the text of a config is data, and return the modules that mmengine would import for it.

    Raises:
        UnsafeCheckpointError: It is not.
    """
    if '{{' in text:  # mmengine replaces templates before it executes the text, so another text than this would run
        raise UnsafeCheckpointError('its config contains a template, "{{"')
    try:
        statements = ast.parse(text).body
    except SyntaxError:
        return []  # it cannot be executed either
    imports = []
    for statement in statements:
        is_assignment = isinstance(statement, ast.Assign) and all(isinstance(t, ast.Name) for t in statement.targets)
        if not is_assignment or not all(map(_is_plain, ast.walk(statement.value))):
            raise UnsafeCheckpointError(
                f'its config contains code, in line {statement.lineno}: {ast.unparse(statement)}'
            )
        names = {target.id for target in statement.targets}
        if '_base_' in names:
            raise UnsafeCheckpointError(f'its config would execute another file: {ast.unparse(statement)}')
        if 'custom_imports' in names:
            imports += [node.value for node in ast.walk(statement.value) if isinstance(node, ast.Constant)]
    return [name for name in imports if isinstance(name, str)]


def _is_plain(node: ast.AST) -> bool:
    """Whether mmengine writes such a node: literals, and calls of `dict` with keywords or a literal dict.

    It writes the latter for a dict with a key that is not an identifier, such as `custom_keys={'backbone.norm': ...}`.
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
