# UperNet on a nano SwinV2, trained from scratch on the shapes of tools/misc/make_shapes_coco.py. `make demo-seg` runs
# it on a CPU. It has all parts of upernet_swinv2_t.py; size and schedule differ.
#   python tools/misc/make_shapes_coco.py data/shapes_coco
#   tools/dist_train.sh configs/seg/upernet_swinv2_demo.py 2
_base_ = [
    '../_base_/models/upernet_swinv2.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/default_runtime_seg.py',
]
from swinv2_mm.scope import add_scope

classes = ('disc', 'square', 'triangle', 'grass', 'sand', 'sea', 'sky')
palette = [(220, 20, 60), (255, 215, 0), (0, 90, 220), (107, 142, 35), (244, 208, 140), (0, 130, 150), (180, 210, 240)]
crop_size = (128, 128)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
        window_size=8,
        drop_path_rate=0.0,
    ),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=48, num_classes=len(classes)),
    auxiliary_head=dict(in_channels=128, channels=48, num_classes=len(classes)),
)

# Data: 128x128 pixels, flips only.
data_root = 'data/shapes_coco/'
check = dict(type='swinv2_mm.datasets.labels.CheckLabels', num_classes=len(classes))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    check,
    dict(type='Resize', scale=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=crop_size),
    dict(type='LoadAnnotations'),
    check,
    dict(type='PackSegInputs'),
]
dataset = dict(type='BaseSegDataset', data_root=data_root, metainfo=dict(classes=classes, palette=palette))
train_dataloader = dict(
    batch_size=4,
    num_workers=0,  # training takes all cores of a small machine
    dataset=dict(
        dataset, data_prefix=dict(img_path='train2017', seg_map_path='labels/train2017'), pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(dataset, data_prefix=dict(img_path='val2017', seg_map_path='labels/val2017'), pipeline=test_pipeline),
)
test_dataloader = val_dataloader

# Schedule: 900 steps of 8 images. Training from scratch takes a much larger learning rate than fine-tuning.
steps = 900
train_cfg = dict(max_iters=steps, val_interval=steps)
optim_wrapper = dict(optimizer=dict(lr=2e-3, betas=(0.9, 0.98)), clip_grad=dict(_delete_=True, max_norm=5))
param_scheduler = add_scope(
    'mmseg',
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=steps),
)
randomness = dict(seed=0)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=steps))
