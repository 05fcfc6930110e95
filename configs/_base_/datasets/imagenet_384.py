# ImageNet-1K at 384x384: as imagenet_256.py, but tests on the whole image, resized without keeping its aspect ratio
# (TEST.CROP: False in the official configs).
_base_ = './imagenet_256.py'
from swinv2_mm.scope import add_scope

train_pipeline = add_scope(
    'mmpretrain',
    _base_.load,
    dict(type='RandomResizedCrop', scale=384, backend='pillow', interpolation='bicubic'),
    *_base_.augment,
    dict(type='PackInputs'),
)
test_pipeline = add_scope(
    'mmpretrain',
    _base_.load,
    dict(type='Resize', scale=(384, 384), backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
)
train_dataloader = dict(batch_size=32, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=32, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
