"""The channels that necks and heads of a config read, changed for another backbone."""

import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS


def new_channels(model: dict, old: list[int], new: list[int]) -> dict:
    """What changes in the parts of a model that read the backbone: the neck, or all heads.

    Args:
        model: Config of the model.
        old: Channels of each feature map of the backbone that is replaced.
        new: Channels of each feature map of the new one.

    Returns:
        The keys of `model` to override.

    Raises:
        ValueError: The neck cannot be run.
    """
    result, neck = {}, model.get('neck')
    if neck:
        result['neck'] = _adapt(neck, old, new)
        if not isinstance(neck, dict) or 'out_channels' in neck:
            old = new
        else:  # it may pass feature maps of the backbone on, as JPU
            old, new = _neck_channels(neck, old), _neck_channels(_merge(neck, result['neck']), new)
    if old != new:
        heads = [key for key in model if key not in ('backbone', 'neck', 'data_preprocessor')]
        result |= {name: _adapt(model[name], old, new) for name in heads}
    return {name: change for name, change in result.items() if change is not None}


@torch.no_grad()
def _neck_channels(neck: dict, channels: list[int]) -> list[int]:
    """Channels of each feature map that a neck returns."""
    maps = tuple(torch.zeros(1, width, 64 >> i, 64 >> i) for i, width in enumerate(channels))
    try:
        return [m.shape[1] for m in revert_sync_batchnorm(MODELS.build(neck)).eval()(maps)]
    except Exception as error:
        raise ValueError(f'model.neck of type {neck["type"]} cannot be run: {error!r}') from error


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
            return type(value)(new[i] for i in order)  # JPU takes a tuple only
    return None


def _merge(item, change):
    """An item with what changes in it. In a config that inherits, lists are replaced as a whole."""
    if change is None or not isinstance(change, dict):
        return item if change is None else change
    return dict(item, **{key: _merge(item[key], value) for key, value in change.items()})
