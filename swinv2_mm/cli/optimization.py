"""The optimizer and schedule of a config, changed for a Swin V2 backbone."""

import re

from mmengine.config import Config

# Optimizers of the toolboxes' Swin V1 configs, each with the total batch size of its learning rate.
OPTIMIZERS = {
    'mmdet': (dict(type='AdamW', lr=1e-4, weight_decay=0.05), 16),
    'mmseg': (dict(type='AdamW', lr=6e-5, weight_decay=0.01), 16),
    'mmaction': (dict(type='AdamW', lr=1e-3, weight_decay=0.02), 64),
}
BACKBONE_LR = {'mmaction': 0.1}  # the factor in them
WARM_UP = dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000)  # of mmdet's Swin V1 configs


def new_optimization(cfg: Config) -> tuple[dict, list[str]]:
    """What changes in the optimizer and the schedule of a config with a Swin V2 backbone.

    Returns:
        The keys to override, and a sentence about each change that is not plain from them.

    Raises:
        ValueError: The optimizer is not understood.
    """
    wrapper = cfg.get('optim_wrapper')
    if not wrapper:
        return {}, ['the config has no optim_wrapper: it is for tests only']
    if not isinstance(wrapper.get('optimizer'), dict):
        raise ValueError(f'optim_wrapper of type {wrapper.get("type")} has no optimizer')
    result, notes = dict(optim_wrapper=dict(constructor='swinv2_mm.SwinV2OptimWrapperConstructor')), []
    paramwise, is_new = wrapper.get('paramwise_cfg') or {}, wrapper.optimizer.type != 'AdamW'
    kept = _kept_options(wrapper.get('constructor'), paramwise)
    if kept is None:
        kept = {}
        notes.append(f'optim_wrapper: without the options of {wrapper.constructor}')
    if is_new and cfg.default_scope in BACKBONE_LR:
        kept['custom_keys'] = dict(backbone=dict(lr_mult=BACKBONE_LR[cfg.default_scope])) | kept.get('custom_keys', {})
    if kept != paramwise:
        result['optim_wrapper']['paramwise_cfg'] = dict(_delete_=True, **kept) if paramwise else kept
    if is_new:
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
            # `_scope_`, which mmengine adds, is the default scope
            result['param_scheduler'] = [{k: v for k, v in s.items() if k != '_scope_'} for s in adapted]
    return result, notes


def _kept_options(constructor: str | None, paramwise: dict) -> dict | None:
    """Options of an optimizer wrapper constructor that apply with Swin V2; None for a constructor with other ones."""
    if constructor == 'SwinOptimWrapperConstructor':  # of mmaction; its options are what mmengine calls custom_keys
        paramwise = dict(custom_keys=paramwise)
    elif constructor not in (None, 'DefaultOptimWrapperConstructor'):
        return None
    keys = {key: value for key, value in paramwise.get('custom_keys', {}).items() if not _is_of_old_backbone(key)}
    return dict(paramwise, **(dict(custom_keys=keys) if 'custom_keys' in paramwise else {}))


def _is_of_old_backbone(custom_key: str) -> bool:
    """Whether a key of `custom_keys` names a part of the former backbone that Swin V2 lacks."""
    return custom_key in ('absolute_pos_embed', 'relative_position_bias_table') or bool(
        re.match(r'backbone\..', custom_key)
    )


def _new_schedule(schedulers: list[dict], ratio: float) -> list[dict]:
    """Parameter schedulers for a learning rate that is multiplied by `ratio`, with a warm-up."""
    adapted = [dict(s, eta_min=float(f'{s["eta_min"] * ratio:g}')) if s.get('eta_min') else s for s in schedulers]
    return adapted if any(s.type.endswith(('LinearLR', 'WarmupLR')) for s in schedulers) else [WARM_UP, *adapted]
