"""Put a Swin V2 backbone into a config of mmdet, mmseg or mmaction: what changes with it, as a config that inherits.

The feature maps that necks and heads read are found by running the backbone of the config. The result is checked by a
training step of the new model on random data.
"""

import math
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from swinv2_mm.cli.inputs import input_shape, random_batch, toolbox
from swinv2_mm.models.sizes import resolve_arch

STRIDES = (4, 8, 16, 32)  # of the stages of a Swin V2
NORMALIZATION = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])  # of RGB, in all pre-training
# Optimizers of the toolboxes' Swin V1 configs, each with the total batch size of its learning rate.
OPTIMIZERS = {
    'mmdet': (dict(type='AdamW', lr=1e-4, weight_decay=0.05), 16),
    'mmseg': (dict(type='AdamW', lr=6e-5, weight_decay=0.01), 16),
    'mmaction': (dict(type='AdamW', lr=1e-3, weight_decay=0.02), 64),
}
WARM_UP = dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000)  # of mmdet's Swin V1 configs
LINE_LENGTH = 100  # of the text of a config
TRIAL_SHAPES = {'mmdet': [256, 256], 'mmseg': [128, 128], 'mmaction': [8, 64, 64]}
# 2D backbones of mmaction that mix the frames of a clip; a 2D Swin V2 in their place would see single frames
MIX_FRAMES = ('*TSM', 'ResNetTIN', 'TANet')


@dataclass(frozen=True)
class Backbone:
    """The Swin V2 to put in.

    Attributes:
        arch: As of `SwinTransformerV2`.
        window: Tokens of a window along height and width; None for 16, and for 7 in video, where windows have 8 frames.
        checkpoint: Weights to start from, or None.
    """

    arch: str | dict
    window: int | None = None
    checkpoint: str | None = None


@dataclass(frozen=True)
class FeatureMap:
    """Channels and stride of an output of a backbone or neck."""

    channels: int
    stride: int


def changes(cfg: Config, backbone: Backbone) -> tuple[dict, list[str]]:
    """What changes in a config with this backbone.

    Returns:
        The keys to override, and a sentence about each change that is not plain from them.

    Raises:
        ValueError: The config has no backbone, or one whose place a Swin V2 cannot take; or its optimizer is not
            understood.
    """
    scope = toolbox(cfg)
    if scope not in OPTIMIZERS:
        raise ValueError(f'the config is one of {scope}, not of {", ".join(OPTIMIZERS)}')
    model = cfg.get('model') or {}
    if not isinstance(model.get('backbone'), dict):
        inner = [key for key, value in model.items() if isinstance(value, dict) and 'backbone' in value]
        where = f': model.{inner[0]} has one; put it into the config of that model' if inner else ''
        raise ValueError(f'model of type {model.get("type")} has no backbone{where}')
    init_default_scope(scope)
    old_maps = _feature_maps(cfg)
    stages, notes = _stages(cfg, old_maps)
    width = resolve_arch(backbone.arch)['embed_dims']
    channels = [m.channels for m in old_maps], [width * 2**i for i in stages]
    model_changes = dict(backbone=_new_backbone(cfg, backbone, stages), **_new_channels(cfg, *channels))
    if model.get('pretrained'):
        model_changes['pretrained'] = None
    normalization = _new_normalization(cfg)
    if normalization:
        model_changes['data_preprocessor'] = normalization
        notes.append('model.data_preprocessor: RGB, normalised as in the pre-training of Swin V2')
    result = dict(model=model_changes)
    if cfg.get('load_from'):
        result['load_from'] = None
        notes.append(f'load_from: {cfg.load_from} is for the former backbone')
    optimization, more = _new_optimization(cfg)
    return result | optimization, notes + more


def source(base: str, parts: dict, notes: Sequence[str] = ()) -> str:
    """The text of a config that inherits `base` and overrides `parts`."""
    comments = ''.join(f'# {note}.\n' for note in notes)
    return f'{comments}_base_ = {base!r}\n\n' + ''.join(f'{key} = {_code(value)}\n' for key, value in parts.items())


def _code(value, indent: int = 0) -> str:
    """A config value as Python code, dicts as `dict(...)` with an argument to a line where one line is too long."""
    if not isinstance(value, (dict, list)):
        return repr(value)
    if isinstance(value, dict) and all(key.isidentifier() for key in value):
        start, end, names = 'dict(', ')', [f'{key}=' for key in value]
    elif isinstance(value, dict):
        start, end, names = '{', '}', [f'{key!r}: ' for key in value]
    else:
        start, end, names = '[', ']', [''] * len(value)
    items = [name + _code(item, indent + 4) for name, item in zip(names, _items(value), strict=True)]
    line = start + ', '.join(items) + end
    if len(line) + indent <= LINE_LENGTH and '\n' not in line:
        return line
    lines = ''.join(f'{" " * (indent + 4)}{item},\n' for item in items)
    return f'{start}\n{lines}{" " * indent}{end}'


def _items(value: dict | list) -> list:
    return list(value.values()) if isinstance(value, dict) else value


def read(text: str) -> Config:
    """Read the text of a config. A relative path in its `_base_` does not work."""
    return Config.fromstring(text, '.py')


# ---------------------------------------------------------------- backbone


@torch.no_grad()
def _feature_maps(cfg: Config) -> list[FeatureMap]:
    """What the backbone of a config returns.

    Raises:
        ValueError: It cannot be built or run.
    """
    old = {k: None if k in ('init_cfg', 'pretrained') else v for k, v in cfg.model.backbone.items()}
    x = torch.zeros(1, 3, *([8] if _is_3d(cfg) else []), 256, 256)
    try:
        module = revert_sync_batchnorm(MODELS.build(old))
        module.eval()  # of mmdet's ResNet, it returns None
        out = module(x)
    except Exception as error:
        raise ValueError(f'model.backbone of type {old["type"]} cannot be run: {_one_line(error)}') from error
    maps = [out] if isinstance(out, Tensor) else out
    if not all(isinstance(m, Tensor) and m.dim() == x.dim() for m in maps):
        raise ValueError(f'model.backbone of type {old["type"]} returns no plain feature maps')
    return [FeatureMap(m.shape[1], x.shape[-1] // m.shape[-1]) for m in maps]


def _is_3d(cfg: Config) -> bool:
    return 'NCTHW' in str((cfg.model.get('data_preprocessor') or {}).get('format_shape'))


def _stages(cfg: Config, maps: list[FeatureMap]) -> tuple[tuple[int, ...], list[str]]:
    """The stages of a Swin V2 that stand for the feature maps of the former backbone, and notes about them.

    Raises:
        ValueError: It has other strides, or mixes the frames of a clip.
    """
    old = cfg.model.backbone
    if any(fnmatch(str(old.type), pattern) for pattern in MIX_FRAMES):
        raise ValueError(f'model.backbone of type {old.type} mixes the frames of a clip, which a 2D Swin V2 does not')
    strides, indices = tuple(m.stride for m in maps), tuple(old.get('out_indices', ()))
    note = f'model.backbone: the former one has strides {strides}'
    if list(strides) == sorted(set(strides)) and set(strides) <= set(STRIDES):
        stages = tuple(STRIDES.index(s) for s in strides)
        is_dilated = indices and indices[-1] == len(STRIDES) - 1 and indices != stages
        return stages, [f'{note}; of Swin V2, stage {stages[-1] + 1} has the last of them'] if is_dilated else []
    # heads of mmseg do not depend on the stride
    if cfg.default_scope == 'mmseg' and len(set(strides)) < len(strides) == len(indices) <= max(indices) + 1 <= 4:
        return indices, [f'{note}, by dilation; Swin V2 has {tuple(STRIDES[i] for i in indices)}']
    raise ValueError(
        f'model.backbone of type {old.type} returns feature maps of strides {strides}; Swin V2 has {STRIDES}'
    )


def _new_backbone(cfg: Config, backbone: Backbone, stages: tuple[int, ...]) -> dict:
    is_3d, old = _is_3d(cfg), cfg.model.backbone
    window = backbone.window or (7 if is_3d else 16)
    new = dict(
        _delete_=True,
        type='swinv2_mm.SwinTransformer3DV2' if is_3d else 'swinv2_mm.SwinTransformerV2',
        arch=backbone.arch,
        window_size=(8, window, window) if is_3d else window,
        out_indices=stages,
        **{key: old[key] for key in ('drop_path_rate', 'with_cp') if old.get(key)},
    )
    if cfg.model.type == 'Recognizer2D':  # takes a tuple of one feature map from mmpretrain's backbones only
        new['type'] = 'mmpretrain.' + new['type']
    if backbone.checkpoint:
        new['init_cfg'] = dict(type='Pretrained', checkpoint=backbone.checkpoint)
    return new


# ---------------------------------------------------------------- channels


def _new_channels(cfg: Config, old: list[int], new: list[int]) -> dict:
    """What changes in the parts of the model that read the backbone: the neck, or all heads."""
    readers = (
        ['neck'] if cfg.model.get('neck') else [k for k in cfg.model if k not in ('backbone', 'data_preprocessor')]
    )
    adapted = {name: _adapt(cfg.model[name], old, new) for name in readers}
    return {name: part for name, part in adapted.items() if part is not None}


def _adapt(part, old: list[int], new: list[int]):
    """What changes in a part of the config that reads channels `new` instead of `old`, or None."""
    if isinstance(part, (list, tuple)):
        adapted = [_adapt(item, old, new) for item in part]
        return [_merge(item, change) for item, change in zip(part, adapted, strict=True)] if any(adapted) else None
    if not isinstance(part, dict):
        return None
    result = {}
    for key, value in part.items():
        if key.endswith('in_channels'):
            index = 0 if key == 'c1_in_channels' else part.get('in_index', -1)
            changed = _adapt_channels(value, index, old, new)
        else:
            changed = _adapt(value, old, new)
        if changed is not None:
            result[key] = changed
    return result or None


def _adapt_channels(value, index, old: list[int], new: list[int]):
    """`in_channels` of a part that reads the feature maps `index`, or None if they are not its channels."""
    if isinstance(value, int):
        return new[index] if isinstance(index, int) and value == old[index] else None
    if not isinstance(value, (list, tuple)):
        return None
    indices = list(range(len(old)) if isinstance(index, int) else index)
    for order in (indices, indices[::-1]):
        if list(value) == [old[i] for i in order]:
            return [new[i] for i in order]
    return None


def _merge(item, change):
    """An item of a list with what changes in it; lists are replaced as a whole in a config that inherits."""
    if change is None or not isinstance(change, dict):
        return item if change is None else change
    return dict(item, **{key: _merge(item[key], value) for key, value in change.items()})


# ---------------------------------------------------------------- data and optimizer


def _new_normalization(cfg: Config) -> dict:
    preprocessor = cfg.model.get('data_preprocessor') or {}
    result = {}
    for key, wanted in NORMALIZATION.items():
        value = preprocessor.get(key)
        if not value or len(value) != 3 or not all(map(lambda a, b: math.isclose(a, b, rel_tol=1e-2), value, wanted)):
            result[key] = wanted
    if cfg.default_scope != 'mmaction' and not preprocessor.get('bgr_to_rgb'):
        result['bgr_to_rgb'] = True
    return result


def _new_optimization(cfg: Config) -> tuple[dict, list[str]]:
    wrapper = cfg.get('optim_wrapper') or {}
    if not isinstance(wrapper.get('optimizer'), dict):
        raise ValueError(f'optim_wrapper of type {wrapper.get("type")} has no optimizer')
    result, notes = dict(optim_wrapper=dict(constructor='swinv2_mm.SwinV2OptimWrapperConstructor')), []
    paramwise = wrapper.get('paramwise_cfg') or {}
    # options of another constructor mean something else
    kept = dict(paramwise) if wrapper.get('constructor') in (None, 'DefaultOptimWrapperConstructor') else {}
    if 'custom_keys' in kept:
        kept['custom_keys'] = {k: v for k, v in kept['custom_keys'].items() if not _is_of_old_backbone(k)}
    if kept != paramwise:
        result['optim_wrapper']['paramwise_cfg'] = dict(_delete_=True, **kept)
    if wrapper.optimizer.type != 'AdamW':
        optimizer, batch_size = OPTIMIZERS[cfg.default_scope]
        result['optim_wrapper']['optimizer'] = dict(_delete_=True, **optimizer)
        if (cfg.get('auto_scale_lr') or {}).get('base_batch_size') != batch_size:
            result['auto_scale_lr'] = dict(base_batch_size=batch_size)
        notes.append(
            f'optim_wrapper: AdamW as in the Swin V1 configs of {cfg.default_scope}, instead of '
            f'{wrapper.optimizer.type}; lr={optimizer["lr"]:g} is for {batch_size} samples on all GPUs together'
        )
        schedulers = cfg.get('param_scheduler') or []
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
        adapted = _new_schedule(schedulers, optimizer['lr'] / wrapper.optimizer.lr)
        if adapted != schedulers:
            result['param_scheduler'] = adapted
    return result, notes


def _is_of_old_backbone(custom_key: str) -> bool:
    """Whether a key of `custom_keys` names a part of the former backbone that Swin V2 lacks."""
    return custom_key in ('absolute_pos_embed', 'relative_position_bias_table') or bool(
        re.match(r'backbone\..', custom_key)
    )


def _new_schedule(schedulers: list[dict], ratio: float) -> list[dict]:
    """Parameter schedulers for a learning rate that is multiplied by `ratio`, with a warm-up."""
    adapted = [dict(s, eta_min=float(f'{s["eta_min"] * ratio:g}')) if s.get('eta_min') else s for s in schedulers]
    return adapted if any(s.type == 'LinearLR' for s in schedulers) else [WARM_UP, *adapted]


# ---------------------------------------------------------------- check


def check(cfg: Config) -> None:
    """Train a step of a config's model on random data, with one block in each stage of its backbone.

    Raises:
        ValueError: It fails; the message names the part of the model.
    """
    init_default_scope(toolbox(cfg))
    model_cfg = Config(cfg.to_dict()).model
    arch = resolve_arch(model_cfg.backbone.arch)
    model_cfg.backbone.update(arch=dict(arch, depths=(1,) * len(arch['depths']), extra_norm_every_n_blocks=0))
    model_cfg.backbone.update(init_cfg=None)
    preprocessor = model_cfg.get('data_preprocessor') or {}
    if 'batch_augments' in preprocessor:
        preprocessor.batch_augments = None
    if 'size' in preprocessor:
        preprocessor.size = tuple(TRIAL_SHAPES[cfg.default_scope])
    model = None
    try:
        model = revert_sync_batchnorm(MODELS.build(model_cfg)).to(get_device())
        shape = input_shape(cfg, TRIAL_SHAPES[cfg.default_scope])
        data = model.data_preprocessor(random_batch(cfg, shape, 2, model), True)
        MessageHub.get_current_instance().update_info('iter', 0)  # as the Runner does; some heads read it
        loss = model.parse_losses(model(**data, mode='loss'))[0]
        loss.backward()
    except Exception as error:
        raise ValueError(f'{_failed_part(model, error)}: {_one_line(error)}') from error
    if not loss.isfinite():
        raise ValueError(f'the loss of a training step on random data is {loss.item()}')


def _failed_part(model: nn.Module | None, error: Exception) -> str:
    """The innermost module that was running when an error was raised."""
    if model is None:
        return 'the model cannot be built'
    names = {id(module): (name, type(module).__name__) for name, module in model.named_modules() if name}
    running = [frame.f_locals.get('self') for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [names[id(module)] for module in running if id(module) in names]
    return 'model.{} of type {}'.format(*found[-1]) if found else 'model'


def _one_line(error: Exception) -> str:
    return f'{type(error).__name__}: ' + ' '.join(str(error).split())
