# A nano SwinV2, fine-tuned on 200 labelled digits of tools/misc/make_digits.py. `make demo-cls` runs it on a CPU, from
# scratch and after configs/ssl/simmim_swinv2_demo.py. It has all parts of swinv2_t_in1k_256.py; size, augmentation and
# schedule differ.
#   python tools/misc/make_digits.py data/digits
#   tools/dist_train.sh configs/cls/swinv2_demo.py 2
_base_ = [
    '../_base_/models/classifier_swinv2.py',
    '../_base_/datasets/imagenet_256.py',
    '../_base_/schedules/adamw_300e.py',
    '../_base_/default_runtime_cls.py',
]
from swinv2_mm.scope import add_scope

model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=32, depths=(2, 2, 2), num_heads=(2, 4, 8)),
        patch_size=2,
        window_size=4,
        drop_path_rate=0.0,
        out_indices=(2,),
    ),
    head=dict(num_classes=10, in_channels=128),
    train_cfg=None,
)

# Data: 32x32 pixels, random crops and rotations.
data_root = 'data/digits/'
image_size = 32
train_pipeline = add_scope(
    'mmpretrain',
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=image_size, crop_ratio_range=(0.67, 1.0)),
    dict(type='Rotate', angle=10.0, prob=1.0),
    dict(type='PackInputs'),
)
test_pipeline = add_scope(
    'mmpretrain',
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, interpolation='bicubic'),
    dict(type='PackInputs'),
)
dataset = dict(_delete_=True, _scope_='mmpretrain', type='CustomDataset', data_root=data_root)
train_dataloader = dict(
    batch_size=20,
    num_workers=0,  # training takes all cores of a small machine
    dataset=dict(dataset, ann_file='labelled.txt', data_prefix='train', pipeline=train_pipeline),
)
val_dataloader = dict(batch_size=50, num_workers=0, dataset=dict(dataset, data_prefix='val', pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

# Schedule: 5 steps of 40 images in each epoch.
max_epochs = 60
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = add_scope(
    'mmpretrain',
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, begin=5, end=max_epochs, convert_to_iter_based=True),
)
randomness = dict(seed=0)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_epochs))
