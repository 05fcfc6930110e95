# ImageNet-22K at 192x192, augmented and tested as imagenet_256.py: on the central 192x192 of images whose shorter side
# is 219 = int(256 / 224 * 192). Both lists have lines "path class".
_base_ = './imagenet_256.py'
from swinv2_mm.scope import add_scope

train_pipeline = add_scope(
    'mmpretrain',
    _base_.load,
    dict(type='RandomResizedCrop', scale=192, backend='pillow', interpolation='bicubic'),
    *_base_.augment,
    dict(type='PackInputs'),
)
test_pipeline = add_scope(
    'mmpretrain',
    _base_.load,
    dict(type='ResizeEdge', scale=219, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=192),
    dict(type='PackInputs'),
)
data_root = 'data/imagenet22k/'
dataset = dict(_scope_='mmpretrain', type='ImageNet21k', data_root=data_root, data_prefix='images')
train_dataloader = dict(dataset=dict(dataset, _delete_=True, ann_file='meta/train.txt', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(dataset, _delete_=True, ann_file='meta/val.txt', pipeline=test_pipeline))
test_dataloader = val_dataloader
