# swinv2_demo.py with images and windows of twice the side, for a test of the same checkpoint without training.
#   python tools/test.py configs/cls/swinv2_demo_w8.py work_dirs/demo_cls/train_pre-trained/epoch_60.pth
_base_ = './swinv2_demo.py'
from swinv2_mm.scope import add_scope

model = dict(backbone=dict(window_size=8))
test_pipeline = add_scope(
    'mmpretrain',
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=64, interpolation='bicubic'),
    dict(type='PackInputs'),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
