# SwinV2-B on ImageNet-22K at 192x192 with window 12 (A2.1; official swinv2_base_patch4_window12_192_22k.yaml): lr 1e-3
# for 4096 images, 90 epochs of which 5 are warm-up, weight decay 0.1, drop path 0.2.
#   tools/dist_train.sh configs/cls/swinv2_b_in22k_192.py 8
_base_ = [
    '../_base_/models/classifier_swinv2.py',
    '../_base_/datasets/imagenet22k_192.py',
    '../_base_/schedules/adamw_300e.py',
    '../_base_/default_runtime_cls.py',
]
from swinv2_mm.scope import add_scope

model = dict(
    data_preprocessor=dict(num_classes=21841),
    # stage 4 is one window of 6x6
    backbone=dict(arch='base', window_size=(12, 12, 12, 6), drop_path_rate=0.2),
    head=dict(in_channels=1024, num_classes=21841),
)
epochs = 90
train_cfg = dict(max_epochs=epochs)
param_scheduler = add_scope(
    'mmpretrain',
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, begin=5, end=epochs, convert_to_iter_based=True),
)
optim_wrapper = dict(
    accumulative_counts=4,  # 8 GPUs x 128 images x 4 = 4096
    optimizer=dict(weight_decay=0.1),
)
