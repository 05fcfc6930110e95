# COCO 2017 with semantic segmentation maps, InstaBoost (A2.1), and images of 1536x1536 by scale jitter of [0.1, 2.0]
# (A2.1, A2.2). Tests at 1100 (Table 3), read as the shorter side. The longer side is not stated; 1600 is that of
# Swin V1's HTC++.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'
from swinv2_mm.scope import add_scope

image_size = (1536, 1536)
train_pipeline = add_scope(
    'mmdet',
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, with_seg=True),
    dict(type='swinv2_mm.datasets.transforms.InstaBoost'),
    dict(type='RandomResize', scale=image_size, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(
        type='RandomCrop',
        crop_type='absolute',
        crop_size=image_size,
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
)
test_pipeline = add_scope(
    'mmdet',
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='Resize', scale=(1600, 1100), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
)
train_dataloader = dict(
    num_workers=4,
    persistent_workers=False,
    dataset=dict(data_prefix=dict(seg='stuffthingmaps/train2017/'), pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
