"""Checks that the classes of a config exist, and of the arguments of those of this package."""

import copy
import importlib
import inspect
from collections.abc import Collection, Iterable, Iterator

import torch
from mmengine.config import Config
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry
from mmengine.runner import Runner

from swinv2_mm import registry
from swinv2_mm.arguments import did_you_mean
from swinv2_mm.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS

SCOPE = 'swinv2_mm'
SPLITS = ('train', 'val', 'test')
REGISTRIES = [value for value in vars(registry).values() if isinstance(value, Registry) and value.scope == SCOPE]
# config entries from which the Runner builds objects; all others are variables of the config
BUILT = (*inspect.signature(Runner).parameters, 'model_wrapper_cfg', 'strategy', 'tta_model', 'tta_pipeline')
# suffixes of the config keys of a model's parts that are registered in MODELS, in every toolbox
PARTS = ('backbone', 'neck', 'head', 'roi_extractor', 'data_preprocessor')
WRAPPER_OPTIONS = ('model_wrapper_cfg', 'tta_model')  # built with the model as argument `module`


def check_classes(cfg: Config, parts: Collection[str] = BUILT) -> torch.nn.Module | None:
    """Check that the classes of the model and all classes of this package exist, and the arguments of the latter.

    Args:
        cfg: The config.
        parts: The entries of the config to check.

    Returns:
        The backbone on the meta device, or None if it is not of this package.

    Raises:
        ImportError: A class of this package needs a package that is not installed.
        ValueError: A class does not exist, or has a wrong argument; the message names the option.
    """
    for option in ('model', 'model.backbone', 'optim_wrapper', *(f'{split}_dataloader' for split in SPLITS)):
        _check_dict(cfg, option)
    for option, entry, scope in _entries({key: cfg[key] for key in parts if key in cfg}, cfg.get('default_scope')):
        if _is_ours(entry['type']):
            _check_arguments(option, entry, _find(option, entry['type']))
        if _is_model(option):
            _check_model(option, entry['type'], scope)
    _check_constructor(cfg)
    return _build_backbone(cfg)


def find_model(name: str | type | None, scope: str | None) -> type | None:
    """The class with that name in the model registry of a toolbox, or None; a class is returned as it is."""
    if not isinstance(name, str):
        return name
    with MMENGINE_MODELS.switch_scope_and_registry(scope) as models:
        try:
            return models.get(name)
        except RuntimeError:  # mmengine raises it for some unknown names
            return None


def no_such_class(option: str, name: str, registries: Iterable[Registry]) -> str:
    """Message for a name that is in none of the registries, with similar names from them and their parents."""
    known = set()
    for node in registries:
        while node is not None:
            known |= {f'{SCOPE}.{key}' if node.scope == SCOPE else key for key in node.module_dict}
            node = node.parent
    return f'{option}: there is no {name}{did_you_mean(name, known)}'


def _entries(value, scope: str | None, option: str = '') -> Iterator[tuple[str, dict, str | None]]:
    """Yield each dict with a `type`, at any depth: its option, the dict, and its scope."""
    if isinstance(value, dict):
        scope = value.get('_scope_', scope)
        if isinstance(value.get('type'), str):
            yield option, value, scope
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield from _entries(item, scope, f'{option}.{key}' if option else str(key))


def _check_dict(cfg: Config, option: str) -> None:
    owner, _, name = option.rpartition('.')
    value = (cfg.get(owner) or {} if owner else cfg).get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f'{option} must be a dict, got {value!r}')


def _is_ours(name) -> bool:
    return isinstance(name, str) and name.startswith(f'{SCOPE}.')


def _find(option: str, name: str) -> type:
    """The class of this package with that name, `swinv2_mm.NAME` in a registry or `swinv2_mm.MODULE.NAME`."""
    module, _, short = name.rpartition('.')
    try:
        if module == SCOPE:
            found = next((found for node in REGISTRIES if (found := node.get(name)) is not None), None)
        else:
            found = getattr(importlib.import_module(module), short, None)
    except ModuleNotFoundError as error:
        if not _is_ours(error.name):
            raise ImportError(f'{option}.type: {name} needs a package that is not installed: {error}') from error
        found = None
    if found is None:
        raise ValueError(no_such_class(f'{option}.type', name, REGISTRIES))
    return found


def _check_arguments(option: str, entry: dict, found: type) -> None:
    check = getattr(found.__init__, 'check', None)
    if check is None:
        return
    arguments = {key: value for key, value in entry.items() if key not in ('type', '_scope_')}
    if option.startswith(('custom_hooks.', 'default_hooks.')):
        arguments.pop('priority', None)  # the runner removes it
    if option in WRAPPER_OPTIONS:
        arguments.setdefault('module', None)
    try:
        check(found.__name__, arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{option}: {error}') from error


def _is_model(option: str) -> bool:
    first, *rest = [part for part in option.split('.') if not part.isdecimal()]  # without list indices
    return first == 'model' and (not rest or rest[-1].endswith(PARTS))


def _check_model(option: str, name: str, scope: str | None) -> None:
    with MMENGINE_MODELS.switch_scope_and_registry(scope) as models:
        if find_model(name, scope) is None:
            raise ValueError(no_such_class(f'{option}.type', name, (models, MODELS)))


def _check_constructor(cfg: Config) -> None:
    wrapper = copy.deepcopy(cfg.get('optim_wrapper')) or {}
    name, settings = wrapper.pop('constructor', None), wrapper.pop('paramwise_cfg', None)
    if not _is_ours(name):
        return
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get(name)
    if constructor is None:
        raise ValueError(no_such_class('optim_wrapper.constructor', name, [OPTIM_WRAPPER_CONSTRUCTORS]))
    constructor(wrapper, settings)


def _build_backbone(cfg: Config) -> torch.nn.Module | None:
    backbone = (cfg.get('model') or {}).get('backbone') or {}
    if not _is_ours(backbone.get('type')):
        return None
    try:
        with torch.device('meta'):
            return MODELS.build(copy.deepcopy(backbone))
    except (TypeError, ValueError) as error:
        raise ValueError(f'model.backbone: {error}') from error
