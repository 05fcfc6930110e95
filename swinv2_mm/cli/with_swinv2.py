"""Put a Swin V2 backbone into a config of mmdet, mmseg or mmaction: what changes with it, as a config that inherits.

The feature maps that necks and heads read are found by running the backbone of the config. The result is checked by a
training step of the new model on random data.
"""

import math
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from swinv2_mm.cli.channels import new_channels
from swinv2_mm.cli.inputs import input_shape, random_batch, toolbox
from swinv2_mm.cli.optimization import OPTIMIZERS, new_optimization
from swinv2_mm.models.sizes import resolve_arch

STRIDES = (4, 8, 16, 32)  # of the stages of a Swin V2
NORMALIZATION = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])  # of RGB, in all pre-training
LINE_LENGTH = 100  # of the text of a config
# Samples and shape of a training step on random data. Necks of mmdet have strides up to 128, and mmcv's deformable
# convolution needs maps of 3 x 3 there; norms of mmseg's heads need two samples.
TRIALS = {'mmdet': (1, [384, 384]), 'mmseg': (2, [128, 128]), 'mmaction': (2, [8, 64, 64])}
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
    """Channels and stride in height and width of an output of a backbone."""

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
    model = _model(cfg)
    init_default_scope(cfg.default_scope)
    old_maps = _feature_maps(cfg)
    stages, notes = _stages(cfg, old_maps)
    width = resolve_arch(backbone.arch)['embed_dims']
    channels = [m.channels for m in old_maps], [width * 2**i for i in stages]
    model_changes = dict(backbone=_new_backbone(cfg, backbone, stages), **new_channels(model, *channels))
    if model.type == 'Recognizer2D':
        notes.append('model.backbone: Recognizer2D takes a tuple only from a type that starts with mmpretrain')
    # weights of the former model
    if model.get('pretrained'):
        model_changes['pretrained'] = None
    if isinstance(model.get('init_cfg'), dict) and model.init_cfg.type == 'Pretrained':
        model_changes['init_cfg'] = None
    normalization = _new_normalization(cfg)
    result = dict(model=model_changes)
    if normalization:
        place = model_changes if model.get('data_preprocessor') else result  # the Runner takes either
        place['data_preprocessor'] = normalization
        notes.append('data_preprocessor: RGB, normalised as in the pre-training of Swin V2')
    if cfg.get('load_from'):
        result['load_from'] = None
        notes.append(f'load_from: {cfg.load_from} is for the former backbone')
    optimization, more = new_optimization(cfg)
    return result | optimization, notes + more


def _model(cfg: Config) -> dict:
    """The model of a config, which has a backbone that a Swin V2 may replace.

    Raises:
        ValueError: It has none.
    """
    scope = toolbox(cfg)
    if scope not in OPTIMIZERS:
        raise ValueError(f'the config is one of {scope}, not of {", ".join(OPTIMIZERS)}')
    model = cfg.get('model') or {}
    if not isinstance(model.get('backbone'), dict):
        inner = [key for key, value in model.items() if isinstance(value, dict) and 'backbone' in value]
        where = f': model.{inner[0]} has one; put it into the config of that model' if inner else ''
        raise ValueError(f'model of type {model.get("type")} has no backbone{where}')
    if 'swinv2_mm.' in str(model.backbone.get('type')):
        raise ValueError('model.backbone is a Swin V2 already: change its arch and window_size, and the in_channels')
    return model


def source(base: str, parts: dict, notes: Sequence[str] = ()) -> str:
    """The text of a config that inherits `base` and overrides `parts`."""
    comments = ''.join(
        textwrap.fill(f'{note}.', LINE_LENGTH, initial_indent='# ', subsequent_indent='# ', break_long_words=False)
        + '\n'
        for note in notes
    )
    return f'{comments}_base_ = {base!r}\n\n' + ''.join(
        _code(value, 0, f'{key} = ') + '\n' for key, value in parts.items()
    )


def _code(value, indent: int = 0, name: str = '') -> str:
    """A config value as Python code after `name`; dicts as `dict(...)`, an argument to a line if one is too long."""
    if not isinstance(value, (dict, list)):
        return name + repr(value)
    if isinstance(value, dict) and all(key.isidentifier() for key in value):
        start, end, names = 'dict(', ')', [f'{key}=' for key in value]
    elif isinstance(value, dict):
        start, end, names = '{', '}', [f'{key!r}: ' for key in value]
    else:
        start, end, names = '[', ']', [''] * len(value)
    items = [_code(item, indent + 4, key) for key, item in zip(names, _items(value), strict=True)]
    start = name + start
    line = start + ', '.join(items) + end
    if len(line) + indent < LINE_LENGTH and '\n' not in line:
        return line
    lines = ''.join(f'{" " * (indent + 4)}{item},\n' for item in items)
    return f'{start}\n{lines}{" " * indent}{end}'


def _items(value: dict | list | tuple) -> list:
    return list(value.values() if isinstance(value, dict) else value)


def read(text: str) -> Config:
    """Read the text of a config. A relative path in its `_base_` does not work."""
    return Config.fromstring(text, '.py')


# ---------------------------------------------------------------- backbone


@torch.no_grad()
def _feature_maps(cfg: Config) -> list[FeatureMap]:
    """What the backbone of a config returns.

    Raises:
        ValueError: It does not take RGB, mixes the frames of a clip, or cannot be built or run.
    """
    kind = cfg.model.backbone.type
    channels, frames = cfg.model.backbone.get('in_channels', 3), cfg.model.backbone.get('num_frames', 8)
    if channels != 3:
        raise ValueError(f'model.backbone of type {kind} takes {channels} channels, not RGB')
    if any(fnmatch(str(kind), pattern) for pattern in MIX_FRAMES):
        raise ValueError(f'model.backbone of type {kind} mixes the frames of a clip, which a 2D Swin V2 does not')
    old = {k: None if k in ('init_cfg', 'pretrained') else v for k, v in cfg.model.backbone.items()}
    x = torch.zeros(1, 3, *([frames] if _is_3d(cfg) else []), *to_2tuple(old.get('img_size', 128)))
    try:
        module = revert_sync_batchnorm(MODELS.build(old))
        module.eval()  # of mmdet's ResNet, it returns None
        out = module(x)
    except Exception as error:
        raise ValueError(f'model.backbone of type {kind} cannot be run: {_one_line(error)}') from error
    maps = [out] if isinstance(out, Tensor) else out
    if not all(isinstance(m, Tensor) and m.dim() == x.dim() for m in maps):
        raise ValueError(f'model.backbone of type {kind} returns no plain feature maps')
    return [FeatureMap(m.shape[1], x.shape[-1] // m.shape[-1]) for m in maps]


def _is_3d(cfg: Config) -> bool:
    return 'NCTHW' in str(_data_preprocessor(cfg).get('format_shape'))


def _data_preprocessor(cfg: Config) -> dict:
    return cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}


def _stages(cfg: Config, maps: list[FeatureMap]) -> tuple[tuple[int, ...], list[str]]:
    """The stages of a Swin V2 that stand for the feature maps of the former backbone, and notes about them.

    Raises:
        ValueError: It has other strides.
    """
    old = cfg.model.backbone
    strides, indices = tuple(m.stride for m in maps), tuple(old.get('out_indices', ()))
    note = f'model.backbone: the former one has strides {strides}'
    if list(strides) == sorted(set(strides)) and set(strides) <= set(STRIDES):
        stages = tuple(STRIDES.index(s) for s in strides)
        is_dilated = stages[-1] < len(STRIDES) - 1 and indices[-1:] in ((), (len(STRIDES) - 1,))
        return stages, [f'{note}; of Swin V2, stage {stages[-1] + 1} has the last of them'] if is_dilated else []
    stages = _dilated_stages(strides, indices)
    if cfg.default_scope == 'mmseg' and stages:  # its heads do not depend on the stride
        return stages, [f'{note}, by dilation; Swin V2 has {tuple(STRIDES[i] for i in stages)}']
    raise ValueError(
        f'model.backbone of type {old.type} returns feature maps of strides {strides}; Swin V2 has {STRIDES}'
    )


def _dilated_stages(strides: tuple[int, ...], indices: tuple[int, ...]) -> tuple[int, ...] | None:
    """The stages of a backbone with dilation, which makes strides smaller; None if it is not plain which they are."""
    if len(strides) != len(indices) or list(strides) != sorted(strides):
        return None
    if len(indices) == len(STRIDES):  # all of them; MobileNetV2 counts layers
        indices = (0, 1, 2, 3)
    is_plain = max(indices) < len(STRIDES) and all(s <= STRIDES[i] for s, i in zip(strides, indices, strict=True))
    return indices if is_plain else None


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
    if cfg.model.type == 'Recognizer2D':  # takes a tuple, of one feature map, from mmpretrain's backbones only
        new['type'] = 'mmpretrain.' + new['type']
    if backbone.checkpoint:
        new['init_cfg'] = dict(type='Pretrained', checkpoint=backbone.checkpoint)
    return new


# ---------------------------------------------------------------- data


def _new_normalization(cfg: Config) -> dict:
    preprocessor = _data_preprocessor(cfg)
    result = {}
    for key, wanted in NORMALIZATION.items():
        value = preprocessor.get(key)
        if not value or len(value) != 3 or not all(map(lambda a, b: math.isclose(a, b, rel_tol=1e-2), value, wanted)):
            result[key] = wanted
    if cfg.default_scope != 'mmaction' and not (preprocessor.get('bgr_to_rgb') or preprocessor.get('to_rgb')):
        result['bgr_to_rgb'] = True
    return result


# ---------------------------------------------------------------- check


def check(cfg: Config) -> bool:
    """Train a step of a config's model on random data, with one block in each stage of its backbone.

    Returns:
        Whether all parameters of the backbone get a gradient; not so where neck and heads skip a feature map.

    Raises:
        ValueError: It fails; the message names the part of the model.
    """
    init_default_scope(toolbox(cfg))
    samples, size = TRIALS[cfg.default_scope]
    model = None
    try:
        model = revert_sync_batchnorm(MODELS.build(_small_model(cfg))).to(get_device())
        model.init_weights()  # without it, some heads predict boxes of negative size
        # without the type, because AmpOptimWrapper refuses a CPU
        wrapper = cfg.get('optim_wrapper') or dict(optimizer=OPTIMIZERS[cfg.default_scope][0])
        wrapper = {key: wrapper[key] for key in ('optimizer', 'constructor', 'paramwise_cfg') if key in wrapper}
        optimizer = build_optim_wrapper(model, wrapper)
        batch = random_batch(cfg, input_shape(cfg, size), samples, model, objects=4)
        data = model.data_preprocessor(batch, True)
        for name in ('iter', 'epoch'):  # as the Runner does; some heads read them
            MessageHub.get_current_instance().update_info(name, 0)
        loss = model.parse_losses(model(**data, mode='loss'))[0]
        loss.backward()
        is_used = all(p.grad is not None for p in model.backbone.parameters() if p.requires_grad)
        optimizer.step()
    except Exception as error:
        way_out = '; run this on a machine with a GPU' if 'implementation for device cpu' in str(error) else ''
        raise ValueError(f'{_failed_part(model, error)}: {_one_line(error)}{way_out}') from error
    if not loss.isfinite():
        raise ValueError(f'the loss of a training step on random data is {loss.item()}')
    return is_used


def _small_model(cfg: Config) -> dict:
    """The config's model for a step of one process on small inputs, without weights."""
    model = Config(cfg.to_dict()).model
    arch = resolve_arch(model.backbone.arch)
    model.backbone.update(
        arch=dict(arch, depths=(1,) * len(arch['depths']), extra_norm_every_n_blocks=0), init_cfg=None
    )
    _simplify(model)
    preprocessor = dict(_data_preprocessor(cfg))
    small = dict(batch_augments=None, size=tuple(TRIALS[cfg.default_scope][1]))
    model.data_preprocessor = preprocessor | {key: small[key] for key in small if key in preprocessor} or None
    return model


def _simplify(part) -> None:
    """Change a config of a model for a quick step of one process: no weights to load, and few sampled regions."""
    if isinstance(part, dict):
        if isinstance(part.get('init_cfg'), dict) and part['init_cfg'].get('type') == 'Pretrained':
            part['init_cfg'] = None
        if str(part.get('type')).endswith('Sampler') and 'num' in part:
            part['num'] = min(part['num'], 16)
        if part.get('type') == 'MMSyncBN':  # cannot be built without a process group
            part['type'] = 'BN'
    if isinstance(part, (dict, list, tuple)):
        for item in _items(part):
            _simplify(item)


def _failed_part(model: nn.Module | None, error: Exception) -> str:
    """The innermost module that was built or running when an error was raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    # not the module that lacks an attribute, but the one that asks for it
    running = [frame.f_locals.get('self') for frame in frames if frame.f_code.co_name != '__getattr__']
    if model is None:
        built = [type(module).__name__ for module in running if isinstance(module, nn.Module)]
        return f'{built[-1] if built else "the model"} cannot be built'
    names = {id(module): (name, type(module).__name__) for name, module in model.named_modules() if name}
    found = [names[id(module)] for module in running if id(module) in names]
    return 'model.{} of type {}'.format(*found[-1]) if found else 'model'


def _one_line(error: Exception) -> str:
    text = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # the assertion, if it has no message
    return f'{type(error).__name__}: ' + ' '.join(text.split())
