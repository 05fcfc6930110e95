"""The optimizer and schedule of a config, changed for a Swin V2 backbone."""

import re

from mmengine.config import Config

# Optimizers of the toolboxes' Swin V1 configs, each with the total batch size of its learning rate.
OPTIMIZERS = {
    'mmdet': (dict(type='AdamW', lr=1e-4, weight_decay=0.05), 16),
    'mmseg': (dict(type='AdamW', lr=6e-5, weight_decay=0.01), 16),
    'mmaction': (dict(type='AdamW', lr=1e-3, weight_decay=0.02), 64),
}
MUCH_LARGER = 4  # a larger factor than that of usual batch sizes
SGD_OPTIONS = ('bias_lr_mult', 'dcn_offset_lr_mult')  # of recipes from Caffe
BACKBONE_OPTIONS = {'mmaction': dict(lr_mult=0.1)}  # of them
ADAM_LR = 1e-3  # torch's default
WARM_UP = dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000)  # of mmdet's Swin V1 configs


def new_optimization(cfg: Config) -> tuple[dict, list[str]]:
    """What changes in the optimizer and the schedule of a config with a Swin V2 backbone.

    Returns:
        The keys to override, and a sentence about each change that is not plain from them.

    Raises:
        ValueError: The optimizer is not understood.
    """
    wrapper, scope = cfg.get('optim_wrapper'), cfg.default_scope
    if not wrapper:
        return {}, ['the config has no optim_wrapper: it is for tests only']
    if not isinstance(wrapper.get('optimizer'), dict):
        raise ValueError(f'optim_wrapper of type {wrapper.get("type")} has no optimizer')
    is_adamw = wrapper.optimizer.type == 'AdamW'
    paramwise, notes = _new_options(wrapper, {} if is_adamw else BACKBONE_OPTIONS.get(scope, {}))
    changed = dict(constructor='swinv2_mm.SwinV2OptimWrapperConstructor')
    if paramwise != (wrapper.get('paramwise_cfg') or {}):
        changed['paramwise_cfg'] = dict(_delete_=True, **paramwise) if wrapper.get('paramwise_cfg') else paramwise
    if is_adamw:
        return dict(optim_wrapper=changed), notes + _large_rate(wrapper.optimizer.get('lr', ADAM_LR), paramwise, scope)
    optimizer, batch_size = OPTIMIZERS[scope]
    changed['optimizer'] = dict(_delete_=True, **optimizer)
    notes.append(
        f'optim_wrapper: AdamW as in the Swin V1 configs of {scope}, instead of {wrapper.optimizer.type}; '
        f'lr={optimizer["lr"]:g} is for {batch_size} samples on all GPUs together'
    )
    return dict(optim_wrapper=changed, **_new_rates(cfg, optimizer['lr'], batch_size)), notes


def _new_options(wrapper: dict, backbone: dict) -> tuple[dict, list[str]]:
    """`paramwise_cfg` for Swin V2, and notes; `backbone` are `custom_keys` of the optimizer that replaces SGD."""
    kept = _kept_options(wrapper.get('constructor'), wrapper.get('paramwise_cfg') or {})
    notes = []
    if kept is None:
        kept = {}
        layer_wise = 'swinv2_mm.LearningRateDecayOptimWrapperConstructor'
        notes.append(f'optim_wrapper: without the options of {wrapper.constructor}; {layer_wise} has layer-wise rates')
    if wrapper.optimizer.type != 'AdamW':
        kept = {key: value for key, value in kept.items() if key not in SGD_OPTIONS}
    if backbone:
        kept['custom_keys'] = dict(backbone=backbone) | kept.get('custom_keys', {})
    return kept, notes


def _new_rates(cfg: Config, lr: float, batch_size: int) -> dict:
    """The schedule and the batch size for scaling, where they do not fit the learning rate `lr` of a new optimizer."""
    result = {}
    if (cfg.get('auto_scale_lr') or {}).get('base_batch_size') != batch_size:
        result['auto_scale_lr'] = dict(base_batch_size=batch_size)
    schedulers = cfg.get('param_scheduler') or []
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    adapted = _new_schedule(schedulers, lr / cfg.optim_wrapper.optimizer.get('lr', ADAM_LR))
    if adapted != schedulers:
        # `_scope_`, which mmengine adds, is the default scope
        result['param_scheduler'] = [{k: v for k, v in s.items() if k != '_scope_'} for s in adapted]
    return result


def _large_rate(lr: float, paramwise: dict, scope: str) -> list[str]:
    """A note if AdamW trains the backbone much faster than in the Swin V1 configs, as recipes from scratch do."""
    rate = lr * paramwise.get('custom_keys', {}).get('backbone', {}).get('lr_mult', 1)
    optimizer, batch_size = OPTIMIZERS[scope]
    usual = optimizer['lr'] * BACKBONE_OPTIONS.get(scope, {}).get('lr_mult', 1)
    if rate < MUCH_LARGER * usual:
        return []
    return [
        f'optim_wrapper: the learning rate of the backbone, {rate:g}, is kept; the Swin V1 configs of {scope} have '
        f'{usual:g} for {batch_size} samples on all GPUs together'
    ]


def _kept_options(constructor: str | None, paramwise: dict) -> dict | None:
    """Options of an optimizer wrapper constructor that apply with Swin V2; None for a constructor with other ones."""
    if constructor == 'SwinOptimWrapperConstructor':  # of mmaction; its options are what mmengine calls custom_keys
        paramwise = dict(custom_keys=paramwise)
    elif constructor not in (None, 'DefaultOptimWrapperConstructor', 'swinv2_mm.SwinV2OptimWrapperConstructor'):
        return None
    keys = {key: value for key, value in paramwise.get('custom_keys', {}).items() if not _is_of_old_backbone(key)}
    return dict(paramwise, **(dict(custom_keys=keys) if 'custom_keys' in paramwise else {}))


def _is_of_old_backbone(custom_key: str) -> bool:
    """Whether a key of `custom_keys` names a part of the former backbone."""
    return custom_key in ('absolute_pos_embed', 'relative_position_bias_table') or bool(
        re.match(r'backbone\..', custom_key)
    )


def _new_schedule(schedulers: list[dict], ratio: float) -> list[dict]:
    """Parameter schedulers for a learning rate that is multiplied by `ratio`, with a warm-up.

    A constant rate at the start, which some SGD recipes have for a warm-up, is replaced.
    """
    adapted = [_rescale(s, ratio) for s in schedulers if s.type != 'ConstantLR' or s.get('begin', 0) > 0]
    return adapted if any(_is_warm_up(s) for s in schedulers) else [WARM_UP, *adapted]


def _rescale(scheduler: dict, ratio: float) -> dict:
    """A parameter scheduler with its absolute learning rates multiplied."""
    rates = {key: float(f'{scheduler[key] * ratio:g}') for key in ('eta_min', 'eta_max') if scheduler.get(key)}
    return dict(scheduler, **rates)


def _is_warm_up(scheduler: dict) -> bool:
    is_linear = scheduler['type'] == 'LinearLR' and scheduler.get('start_factor', 1 / 3) < scheduler.get(
        'end_factor', 1
    )
    return is_linear or scheduler['type'].endswith(('WarmupLR', 'OneCycleLR'))
