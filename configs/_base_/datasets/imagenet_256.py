# ImageNet-1K at 256x256 as in the official code (data/build.py, config.py): random crops, flips, RandAugment
# "rand-m9-mstd0.5-inc1", random erasing. Tests on the central 256x256 of images whose shorter side is
# 292 = int(256 / 224 * 256).
_base_ = []  # for the import, see add_scope
from swinv2_mm.scope import add_scope

# Pillow's pixels, as there, and its disregard of EXIF orientation
load = dict(type='LoadImageFromFile', imdecode_backend='pillow', color_type='color_ignore_orientation')
bgr_mean, bgr_std = [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]
augment = [
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(
        type='RandAugment',
        policies='timm_increasing',
        num_policies=2,
        total_level=10,
        magnitude_level=9,
        magnitude_std=0.5,
        hparams=dict(pad_val=[104, 116, 124], interpolation='bicubic'),
    ),
    dict(
        type='RandomErasing',
        erase_prob=0.25,
        mode='rand',
        min_area_ratio=0.02,
        max_area_ratio=1 / 3,
        fill_color=bgr_mean,
        fill_std=bgr_std,
    ),
]
train_pipeline = add_scope(
    'mmpretrain',
    load,
    dict(type='RandomResizedCrop', scale=256, backend='pillow', interpolation='bicubic'),
    *augment,
    dict(type='PackInputs'),
)
test_pipeline = add_scope(
    'mmpretrain',
    load,
    dict(type='ResizeEdge', scale=292, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=256),
    dict(type='PackInputs'),
)
data_root = 'data/imagenet/'
dataset = dict(_scope_='mmpretrain', type='ImageNet', data_root=data_root)
train_dataloader = dict(
    batch_size=128,  # 8 GPUs x 128 images = 1024
    num_workers=8,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(dataset, split='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(dataset, split='val', pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(_scope_='mmpretrain', type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
