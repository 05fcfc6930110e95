# SimMIM pre-training of a nano SwinV2 on the digits of tools/misc/make_digits.py, without their labels. The first step
# of `make demo-cls`, on a CPU. It has all parts of simmim_swinv2_b_in1k_192.py except the normalized target; size and
# schedule differ.
#   python tools/misc/make_digits.py data/digits
#   tools/dist_train.sh configs/ssl/simmim_swinv2_demo.py 2
_base_ = [
    '../_base_/models/simmim_swinv2.py',
    '../_base_/datasets/imagenet_simmim_192.py',
    '../_base_/schedules/adamw_800e.py',
    '../_base_/default_runtime_cls.py',
]
from swinv2_mm.scope import add_scope

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=32, depths=(2, 2, 2), num_heads=(2, 4, 8)),
        patch_size=2,
        window_size=4,
        drop_path_rate=0.0,
        out_indices=(2,),
    ),
    neck=dict(in_channels=128, encoder_stride=8),
    # raw pixels as target, so that predictions can be drawn
    head=dict(
        _delete_=True,
        type='SimMIMHead',
        patch_size=2,
        loss=dict(type='PixelReconstructionLoss', criterion='L1', channel=3),
    ),
)

# Data: 32x32 pixels, random crops, masks of 8x8 pixels. A flip would make other shapes than digits.
data_root = 'data/digits/'
train_pipeline = add_scope(
    'mmpretrain',
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=32, crop_ratio_range=(0.67, 1.0)),
    dict(type='SimMIMMaskGenerator', input_size=32, mask_patch_size=8, model_patch_size=2, mask_ratio=0.6),
    dict(type='PackInputs'),
)
train_dataloader = dict(
    batch_size=32,
    num_workers=0,  # training takes all cores of a small machine
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)

# Schedule: 62 steps of 64 images in each epoch.
max_epochs = 10
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=1e-3, betas=(0.9, 0.98)))
param_scheduler = add_scope(
    'mmpretrain',
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, begin=1, end=max_epochs, convert_to_iter_based=True),
)
randomness = dict(seed=0)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_epochs))
