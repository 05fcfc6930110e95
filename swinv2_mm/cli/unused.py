"""A check for unused outputs of the backbone: DistributedDataParallel stops if parameters get no gradient."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner

from swinv2_mm.arguments import arguments_of
from swinv2_mm.cli.classes import find_model
from swinv2_mm.models import GlobalAttention
from swinv2_mm.models.swin_v2 import SwinV2
from swinv2_mm.registry import MODEL_WRAPPERS, RUNNERS

TOOLBOXES = ('mmdet', 'mmseg', 'mmpretrain')
# heads of mmsegmentation that read other feature maps than those of their `in_index`
IGNORE_IN_INDEX = {
    *('DDRHead', 'DepthwiseSeparableASPPHead', 'IterativeDecodeHead'),
    *('PIDHead', 'SideAdapterCLIPHead', 'VPDDepthHead'),
}


def check_unused(cfg: Config, backbone: SwinV2) -> None:
    """Check that a training in several processes uses all outputs of the backbone.

    DistributedDataParallel waits for the gradient of each parameter, and raises an error at the second step if one is
    missing. The outputs in use are known for models of mmdet and mmsegmentation that have a neck with `start_level`, or
    no neck and heads with `in_index`, and for classifiers of mmpretrain. All other models are assumed to use every
    output.

    Args:
        cfg: Config of a training.
        backbone: Its backbone, which may be on the meta device.

    Raises:
        ValueError: An output is not used; the message gives the options to set.
    """
    if not _waits_for_gradients(cfg):
        return
    stages = sorted(backbone.out_indices)
    used, changes = _used_outputs(cfg, len(stages))
    without_gradient = [stages[i] for i in range(len(stages)) if i not in used and stages[i] >= backbone.frozen_stages]
    if not without_gradient:
        return
    find = f'{"model_wrapper_cfg." if cfg.get("model_wrapper_cfg") else ""}find_unused_parameters=True'
    listed, ways_out = ' and '.join(map(str, without_gradient)), find
    if changes is not None:
        changes = {'model.backbone.out_indices': [stages[i] for i in used], **changes}
        ways_out = f'{" ".join(_option(*change) for change in changes.items())}, or {find}'
    raise ValueError(
        f'nothing uses output {listed} of model.backbone.out_indices={tuple(stages)}, '
        'and DistributedDataParallel stops if parameters get no gradient: '
        f'--cfg-options {ways_out}'
    )


def _option(name: str, value: Any) -> str:
    text = str(value).replace(' ', '')
    return f'{name}="{text}"' if isinstance(value, (list, tuple)) else f'{name}={text}'  # shells interpret brackets


def _waits_for_gradients(cfg: Config) -> bool:
    wrapper = cfg.get('model_wrapper_cfg') or {}
    kind = MODEL_WRAPPERS.get(wrapper.get('type', 'MMDistributedDataParallel'))
    finds = wrapper or cfg
    return (
        cfg.get('launcher', 'none') != 'none'
        and issubclass(RUNNERS.get(cfg.get('runner_type', 'Runner')), Runner)
        and issubclass(kind, MMDistributedDataParallel)
        and not finds.get('find_unused_parameters')
        and not wrapper.get('static_graph')
    )


def _used_outputs(cfg: Config, count: int) -> tuple[list[int], dict[str, Any] | None]:
    """Indices of the backbone's outputs that are used, and config options for a model that gets only these.

    The options are None if there can be no such model.

    Args:
        cfg: The config.
        count: Number of outputs.
    """
    known, model = None, find_model(cfg.model.get('type'), cfg.get('default_scope'))
    if _is_stock(model):
        used = _used_by_neck if cfg.model.get('neck') else _used_by_heads
        known = (_used_by_classifier if model.__name__ == 'ImageClassifier' else used)(cfg, count)
    return known or (list(range(count)), {})


def _first_neck(cfg: Config) -> tuple[Mapping, int, str]:
    """The first neck other than `GlobalAttention`, the number of necks before it, and its option."""
    neck = cfg.model.neck
    for i, part in enumerate(neck if isinstance(neck, list) else [neck]):
        if isinstance(part, dict) and find_model(part.get('type'), cfg.get('default_scope')) is not GlobalAttention:
            return part, i, f'model.neck.{i}' if isinstance(neck, list) else 'model.neck'
    return {}, 0, ''


def _used_by_classifier(cfg: Config, count: int) -> tuple[list[int], dict[str, Any]] | None:
    """Heads for classes read the last output, and GlobalAveragePooling passes on all outputs."""
    neck, head, scope = cfg.model.get('neck'), cfg.model.get('head'), cfg.get('default_scope')
    is_known = _extends(head, 'ClsHead', scope) and (not neck or _extends(neck, 'GlobalAveragePooling', scope))
    return ([count - 1], {}) if is_known else None


def _extends(part, base: str, scope: str | None) -> bool:
    found = find_model(part.get('type'), scope) if isinstance(part, dict) else None
    return isinstance(found, type) and issubclass(found, find_model(base, scope))


def _used_by_neck(cfg: Config, count: int) -> tuple[list[int], dict[str, Any] | None] | None:
    neck, before, option = _first_neck(cfg)
    found = find_model(neck.get('type'), cfg.get('default_scope'))
    arguments = arguments_of(found) if _is_stock(found) else {}
    if not {'in_channels', 'start_level', 'end_level'} <= arguments.keys():
        return None
    start, end = (neck.get(name, arguments[name].default) for name in ('start_level', 'end_level'))
    channels = neck.get('in_channels')
    if not (isinstance(start, int) and isinstance(end, int) and end >= -1 and isinstance(channels, (list, tuple))):
        return None
    used = list(range(count))[start : None if end == -1 else end + 1]
    if not used or len(channels) != count:  # the neck itself reports this
        return None
    if before and used[-1] != count - 1:  # GlobalAttention is built for the last output, which nothing uses
        return used, None
    changes = {f'{option}.in_channels': type(channels)(channels[i] for i in used), f'{option}.start_level': 0}
    return used, {**changes, **({} if end == -1 else {f'{option}.end_level': -1})}


def _used_by_heads(cfg: Config, count: int) -> tuple[list[int], dict[str, Any]] | None:
    heads = dict(_heads(cfg.model))
    if not heads or not all(_reads_in_index(head, cfg.get('default_scope')) for head in heads.values()):
        return None
    read = {option: head.get('in_index', -1) for option, head in heads.items()}
    if not all(isinstance(i, int) and -count <= i < count for index in read.values() for i in _as_list(index)):
        return None
    used = sorted({i % count for index in read.values() for i in _as_list(index)})
    changes = {}
    for option, index in read.items():
        new = [used.index(i % count) for i in _as_list(index)]
        changes[f'{option}.in_index'] = new if isinstance(index, (list, tuple)) else new[0]
    return used, changes


def _as_list(index) -> list[int]:
    return list(index) if isinstance(index, (list, tuple)) else [index]


def _heads(model: Mapping) -> Iterator[tuple[str, Mapping]]:
    for name in ('decode_head', 'auxiliary_head'):
        heads = model.get(name) or []
        if isinstance(heads, dict):
            yield f'model.{name}', heads
        elif isinstance(heads, (list, tuple)):
            yield from ((f'model.{name}.{i}', head) for i, head in enumerate(heads) if isinstance(head, dict))


def _reads_in_index(head: Mapping, scope: str | None) -> bool:
    found = find_model(head.get('type'), scope)
    return _is_stock(found) and hasattr(found, '_transform_inputs') and found.__name__ not in IGNORE_IN_INDEX


def _is_stock(found: type | None) -> bool:
    return found is not None and found.__module__.split('.')[0] in TOOLBOXES
