"""The `_scope_` of a toolbox on the parts of this package's configs."""


def add_scope(scope: str, *parts: dict) -> list[dict]:
    """Name the toolbox in whose registries the parts of a config are looked up.

    A config inherited as `_base_ = 'swinv2_mm::...'` gets `_scope_='swinv2_mm'` from mmengine on each typed dict of its
    top-level variables that has no `_scope_` yet. Whoever reuses such a variable, say `_base_.train_pipeline`, would
    then look for mmdet's transforms in the registries of swinv2_mm, which do not have them. The same holds for the
    pipeline of a dataset class of this package. So the configs name the toolbox themselves:

        _base_ = 'mmdet::_base_/datasets/coco_instance.py'
        from swinv2_mm.scope import add_scope

        train_pipeline = add_scope('mmdet', dict(type='LoadImageFromFile'), ...)

    The import has to come after `_base_`: where it comes first, mmengine takes the file for a "lazy" config. A config
    without a base therefore writes `_base_ = []`.

    Args:
        scope: 'mmdet', 'mmseg', 'mmaction' or 'mmpretrain'.
        parts: Transforms or parameter schedulers.

    Returns:
        Copies of the parts with `_scope_`.
    """
    return [dict(part, _scope_=scope) for part in parts]
