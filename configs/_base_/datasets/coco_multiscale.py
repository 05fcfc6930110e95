# COCO 2017 with multi-scale training (A1): shorter side 480 to 800, longer side at most 1333. The paper does not state
# the test size; this is mmdet's 1333x800.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'
from swinv2_mm.scope import add_scope

train_pipeline = add_scope(
    'mmdet',
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomChoiceResize', scales=[(1333, side) for side in range(480, 801, 32)], keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
)
train_dataloader = dict(num_workers=4, persistent_workers=False, dataset=dict(pipeline=train_pipeline))
