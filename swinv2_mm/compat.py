"""Workarounds for bugs and incompatibilities of mmengine and the toolboxes with current torch, NumPy and setuptools.

Each function checks whether its workaround is needed; its docstring names the upstream issue and when to delete it.
Nothing here imports mmcv or a toolbox, so that importing `swinv2_mm` stays fast.
"""

import argparse
import codecs
import importlib.metadata
import importlib.util
import os
import pickle
import sys
import types
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict

import numpy as np
import torch


def apply() -> None:
    """Apply all workarounds that this environment needs. Idempotent."""
    stub_drn_localizer()
    alias_importlib_metadata()
    stub_vindlu()
    stub_mmpretrain_multimodal()
    declare_torchvision_operators()
    allow_data_classes()
    replace_package_lookup()
    write_metrics_once()
    restore_numpy_names()


def stub_drn_localizer() -> None:
    """Make `mmaction.models` importable although the mmaction2 wheel lacks `models/localizers/drn`.

    The folder has no `__init__.py` and is therefore missing from the wheel: open-mmlab/mmaction2 #2714, fix #2721 not
    merged. Delete when a release of mmaction2 contains the folder.
    """
    name = 'mmaction.models.localizers.drn'
    spec = importlib.util.find_spec('mmaction')
    if spec is None or name in sys.modules:
        return
    localizers = os.path.join(spec.submodule_search_locations[0], 'models', 'localizers')
    if not os.path.isdir(localizers) or os.path.isdir(os.path.join(localizers, 'drn')):
        return
    package, module = types.ModuleType(name), types.ModuleType(f'{name}.drn')
    package.__path__ = []
    package.drn, module.DRN = module, _MissingDRN
    sys.modules.update({package.__name__: package, module.__name__: module})


class _MissingDRN:
    """Placeholder for mmaction's DRN, which its wheel lacks."""

    def __init__(self, *args, **kwargs):
        raise ImportError(
            'the mmaction2 wheel lacks the DRN localizer (open-mmlab/mmaction2 #2714); to use DRN, install '
            'mmaction2 from a clone of its repository with `pip install -e .`'
        )


def alias_importlib_metadata() -> None:
    """Alias Python's `importlib.metadata` as the backport `importlib_metadata`, an undeclared dependency of mmaction2.

    Needed by `utils/dependency.py` of mmaction2 1.2.0 and of mmpretrain 1.2.0; no upstream issue is known. Delete when
    these files import `importlib.metadata`.
    """
    toolboxes = importlib.util.find_spec('mmaction') or importlib.util.find_spec('mmpretrain')
    if toolboxes and importlib.util.find_spec('importlib_metadata') is None:
        sys.modules['importlib_metadata'] = importlib.metadata


def stub_vindlu() -> None:
    """Make `mmaction.models` importable with a transformers release that lacks functions used by mmaction's VindLU.

    mmaction2 1.2.0 imports VindLU whenever transformers is installed. With this empty stub, only VindLU's models are
    not registered. Delete when mmaction2 can be imported with the current transformers.
    """
    name = 'mmaction.models.multimodal.vindlu'
    if importlib.util.find_spec('mmaction') and name not in sys.modules and _has_new_transformers():
        sys.modules[name] = types.ModuleType(name)


def stub_mmpretrain_multimodal() -> None:
    """Make `mmpretrain.models` importable with a transformers release that lacks functions used by its BERT models.

    mmpretrain 1.2.0 imports its multimodal models and data sets whenever transformers and pycocotools are installed,
    and so does mmdet, which imports mmpretrain if it is there. With `WITH_MULTIMODAL=False`, mmpretrain registers
    placeholders for them. Delete when mmpretrain can be imported with the current transformers.
    """
    name = 'mmpretrain.utils.dependency'
    folder = _folder('mmpretrain')
    if folder and name not in sys.modules and _has_new_transformers():
        spec = importlib.util.spec_from_file_location(name, os.path.join(folder, 'utils', 'dependency.py'))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)  # without the package, which imports everything
        module.WITH_MULTIMODAL = False
        sys.modules[name] = module


def _folder(package: str) -> str | None:
    """Folder of an installed package; None if there is none, or only a folder of this name without an `__init__.py`."""
    spec = importlib.util.find_spec(package)
    return os.path.dirname(spec.origin) if spec is not None and spec.origin else None


def _has_new_transformers() -> bool:
    """Whether transformers is installed, in a release without `modeling_utils.apply_chunking_to_forward`."""
    folder = _folder('transformers')
    if folder is None:
        return False
    with open(os.path.join(folder, 'modeling_utils.py'), encoding='utf-8') as file:
        return 'apply_chunking_to_forward' not in file.read()


# operators of torchvision 0.15 to 0.29; those with a backward pass have another one named `_<name>_backward`
TORCHVISION_OPERATORS = ('nms', 'qnms', 'roi_align', 'ps_roi_align', 'roi_pool', 'ps_roi_pool', 'deform_conv2d')


def declare_torchvision_operators() -> None:
    """Make `torchvision` importable with a CPU build of torch although its wheel on PyPI is compiled for CUDA.

    Its library of compiled operators cannot be loaded, and registering their shapes then fails: "operator
    torchvision::nms does not exist". mmpretrain needs only its transforms, which are plain Python. The operators are
    declared without an implementation, so that calling one is an error. Delete when mmpretrain needs no torchvision.
    """
    folder = _folder('torchvision') if _folder('mmpretrain') else None
    if folder is None or torch.version.cuda or torch.version.hip or hasattr(torch.ops.torchvision, 'nms'):
        return
    library = os.path.join(folder, '_C.so')
    if not os.path.exists(library):
        return
    try:
        torch.ops.load_library(library)
    except OSError:
        declared = torch.library.Library('torchvision', 'DEF')
        for name in TORCHVISION_OPERATORS:
            declared.define(f'{name}(Tensor x) -> Tensor')
            declared.define(f'_{name}_backward(Tensor x) -> Tensor')
        globals()['_declared'] = declared  # the declarations live as long as this object


def _data_classes() -> list:
    """Classes and functions in checkpoints besides tensors, each as an object or as (object, name in the file)."""
    from mmengine.logging import HistoryBuffer

    names = [HistoryBuffer, np.ndarray, np.dtype, (_history_buffer_statistic, 'builtins.getattr')]
    for function in (np.array(0.0).__reduce__()[0], np.float64(0).__reduce__()[0]):
        names += [(function, f'numpy.{core}.multiarray.{function.__name__}') for core in ('core', '_core')]
    # pickles refer to np.dtype, not to its subclasses, but torch also checks the subclass of each instance
    names += sorted({type(np.dtype(code)) for code in '?bhilqBHILQefdgFDGSUMm'}, key=str)
    # arguments and configs in checkpoints of the official code and of timm; CfgNode is a dict of the package yacs
    return [*names, argparse.Namespace, (OrderedDict, 'yacs.config.CfgNode')]


def allow_data_classes() -> None:
    """Allow `torch.load(weights_only=True)` to read what Runners store besides tensors: logs, NumPy values, arguments.

    Since torch 2.6, `weights_only=True` is the default. It refuses these classes, so that no training can be resumed:
    open-mmlab/mmengine #1655, fix #1650 not merged. The check stays on; the classes are added to its allow-list, with
    their names in NumPy 1 and in NumPy 2. Delete when mmengine does this itself.
    """
    if torch_release() >= (2, 6):
        torch.serialization.add_safe_globals(_data_classes())


def _history_buffer_statistic(owner: type, name: str):
    """Replacement for `getattr` in checkpoints: HistoryBuffer pickles its methods as `getattr(HistoryBuffer, 'min')`.

    Raises:
        UnpicklingError: The file asks for any other attribute, which no file written by mmengine does.
    """
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'refused to load a checkpoint that looks up {name!r} of {owner!r}')
    return getattr(owner, name)


def load_data(path: str, map_location, mmap: bool):
    """`torch.load(weights_only=True)`, or, before torch 2.6, `torch.load` with a restricted unpickler.

    Before torch 2.6, the allow-list cannot be extended, and files in the format of torch 0.1 can execute code in spite
    of `weights_only=True` (CVE-2025-32434). Delete when torch 2.6 is the minimum version.

    Raises:
        UnpicklingError: The file asks for a class or function that is not on the allow-list.
    """
    if torch_release() >= (2, 6):
        return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    pickler = restricted_pickle()
    return torch.load(path, map_location=map_location, mmap=mmap, weights_only=False, pickle_module=pickler)


def data_globals() -> dict:
    """Allow-list of classes and functions by their names in checkpoints: that of torch, and `_data_classes`."""
    from torch import _weights_only_unpickler as torch_names

    allowed = dict(torch_names._get_allowed_globals())
    allowed |= {'_codecs.encode': codecs.encode, 'builtins.set': set, 'builtins.bytearray': bytearray}  # torch 2.1
    for entry in _data_classes():
        thing, name = entry if isinstance(entry, tuple) else (entry, f'{entry.__module__}.{entry.__qualname__}')
        allowed[name] = thing
    return allowed


def restricted_pickle() -> types.ModuleType:
    """Substitute for the module `pickle` that loads only data ("Restricting Globals" in Python's documentation)."""
    allowed = data_globals()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            full = f'{IMPORT_MAPPING.get(module, module)}.{name}'  # torch.save writes the names of Python 2
            if full not in allowed:
                raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {full}')
            return allowed[full]

    module = types.ModuleType('restricted_pickle')
    module.Unpickler = Unpickler
    module.load = lambda file, **kwargs: Unpickler(file, **kwargs).load()
    return module


def replace_package_lookup() -> None:
    """Replace mmengine's look-up of installed packages, for `_base_ = 'swinv2_mm::...'` and `get_config`.

    mmengine 0.10.7 needs pkg_resources, which setuptools 82 removed, and joins the location of a distribution with its
    name, a path that does not exist for an editable install (PEP 660): open-mmlab/mmengine #1581 (open). The two
    functions are replaced in all modules of mmengine that have imported them. Delete when mmengine's
    `get_installed_path` works without pkg_resources and returns the folder of an editable install.
    """
    if importlib.util.find_spec('pkg_resources') is not None and not _is_editable('swinv2_mm'):
        return
    from mmengine.utils import package_utils

    for function in (is_installed, get_installed_path):
        stock = getattr(package_utils, function.__name__)
        for name, module in list(sys.modules.items()):
            if name.startswith('mmengine') and getattr(module, function.__name__, None) is stock:
                setattr(module, function.__name__, function)


def _is_editable(package: str) -> bool:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return not os.path.isdir(distribution.locate_file(package))


def is_installed(package: str) -> bool:
    """Whether a distribution or a regular package of this name is installed."""
    try:
        get_installed_path(package)
    except (ModuleNotFoundError, RuntimeError):
        return False
    return True


def get_installed_path(package: str) -> str:
    """Folder of a package, given by its import name ('mmseg') or by that of its distribution ('mmsegmentation').

    Raises:
        ModuleNotFoundError: No such package.
        RuntimeError: The package is a namespace package, which has no single folder.
    """
    spec = importlib.util.find_spec(package) or importlib.util.find_spec(_module_of(package))
    if spec is None:
        raise ModuleNotFoundError(f'{package} is not installed')
    if spec.origin is None:
        raise RuntimeError(f'{package} is a namespace package: it has no single folder')
    return os.path.dirname(spec.origin)


def _module_of(distribution: str) -> str:
    """Import name of a distribution; a PackageNotFoundError, which is a ModuleNotFoundError, if there is none."""
    modules = importlib.metadata.distribution(distribution).read_text('top_level.txt') or distribution
    return modules.split()[0]


def write_metrics_once() -> None:
    """Write the metrics of a test only in the first process.

    In mmengine 0.10.7, `LoggerHook.after_test_epoch` of all processes writes to the same file, which can corrupt it. No
    upstream issue is known. Delete when that method writes only in the first process.
    """
    from mmengine.dist import master_only
    from mmengine.hooks import logger_hook

    stock = getattr(logger_hook, 'dump', None)
    if 'dump' in logger_hook.LoggerHook.after_test_epoch.__code__.co_names and not hasattr(stock, '__wrapped__'):
        logger_hook.dump = master_only(stock)


def restore_numpy_names() -> None:
    """Restore names that NumPy removed and that mmdet 3.3 and mmaction2 1.2 still use.

    NumPy 1.24 removed `np.float` (mmdet ytviseval.py), 2.0 removed `np.Inf` and `np.NAN` (mmaction pose transforms and
    AVA metrics), 2.4 removed `np.trapz` and `np.in1d` (mmaction metrics). The toolboxes have no later release. Delete
    each name when the oldest supported toolbox no longer uses it.
    """
    names = {
        'float': lambda: float,
        'Inf': lambda: np.inf,
        'NAN': lambda: np.nan,
        'trapz': lambda: np.trapezoid,
        'in1d': lambda: lambda ar1, ar2, **kwargs: np.isin(np.ravel(ar1), ar2, **kwargs),
    }
    for name, value in names.items():
        if name not in np.__dict__:
            setattr(np, name, value())


def torch_release() -> tuple[int, ...]:
    """Major and minor version of torch."""
    return tuple(int(part) for part in torch.__version__.split('.')[:2])
