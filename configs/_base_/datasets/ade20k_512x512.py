# ADE20K with 512x512 crops (A1): scaling by 0.5 to 2.0, flips, photometric distortion. Tests with a shorter side of
# 512. --tta tests at mmseg's six scales of that size, with flips.
_base_ = 'mmseg::_base_/datasets/ade20k.py'
from swinv2_mm.scope import add_scope

check = dict(type='swinv2_mm.datasets.labels.CheckLabels', num_classes=150)
train_pipeline = add_scope(
    'mmseg',
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    check,
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
)
test_pipeline = add_scope(
    'mmseg',
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    check,
    dict(type='PackSegInputs'),
)
ratios = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
tta_pipeline = add_scope(
    'mmseg',
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(int(r * 2048), int(r * 512)), keep_ratio=True) for r in ratios],
            flips,
            [dict(type='LoadAnnotations', reduce_zero_label=True)],
            [check],
            [dict(type='PackSegInputs')],
        ],
    ),
)
train_dataloader = dict(persistent_workers=False, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
