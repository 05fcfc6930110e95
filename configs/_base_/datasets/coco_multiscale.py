# COCO 2017, shorter side 480 to 800 and longer side at most 1333 (A1). The test size is not stated: mmdet's 1333x800.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'

train_pipeline = [
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomChoiceResize', scales=[(1333, side) for side in range(480, 801, 32)], keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
# as mmengine would stamp another scope on a pipeline that is taken from `_base_ = 'swinv2_mm::...'`
train_pipeline = [dict(t, _scope_='mmdet') for t in train_pipeline]
train_dataloader = dict(num_workers=4, persistent_workers=False, dataset=dict(pipeline=train_pipeline))
