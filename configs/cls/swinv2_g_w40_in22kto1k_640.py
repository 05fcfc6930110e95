# SwinV2-G, fine-tuned on ImageNet-1K at 640x640 (A2.2) from the last checkpoint of swinv2_g_in22k_192.py: lr 2.1e-5 for
# 576 images, 10 epochs of which 2 are warm-up, weight decay 0.1, gradients clipped at 100, drop path 0.5. Paper: 90.17
# top-1 (Table 2).
#   tools/dist_train.sh configs/cls/swinv2_g_w40_in22kto1k_640.py 8 \
#       --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=CHECKPOINT
# The weights were never released, so nothing can be tested against the paper's number. Not stated: the window, here a
# sixteenth of the image as in the other models; test crops and all of the augmentation, with Mixup, CutMix and label
# smoothing, here those of L at 384; the start of the warm-up and the end of the decay, here the official code's; a
# layer-wise decay of the learning rate, here none. Memory as in configs/det/htc_swinv2_g.py.
_base_ = [
    '../_base_/models/classifier_swinv2.py',
    '../_base_/datasets/imagenet_384.py',
    '../_base_/schedules/adamw_finetune_30e.py',
    '../_base_/default_runtime_cls.py',
    '../_base_/memory/fsdp.py',
]
from swinv2_mm.scope import add_scope

model = dict(
    backbone=dict(
        arch='giant',
        window_size=(40, 40, 40, 20),
        pretrained_window_sizes=(12, 12, 12, 6),
        drop_path_rate=0.5,
        with_cp=True,
        sequential_stages=(0, 1),
    ),
    head=dict(in_channels=4096),
)
train_pipeline = add_scope(
    'mmpretrain',
    _base_.load,
    dict(type='RandomResizedCrop', scale=640, backend='pillow', interpolation='bicubic'),
    *_base_.augment,
    dict(type='PackInputs'),
)
test_pipeline = add_scope(
    'mmpretrain',
    _base_.load,
    dict(type='Resize', scale=(640, 640), backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
)
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
epochs = 10
train_cfg = dict(max_epochs=epochs)
param_scheduler = add_scope(
    'mmpretrain',
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, begin=2, end=epochs, convert_to_iter_based=True),
)
optim_wrapper = dict(
    accumulative_counts=9,  # 8 GPUs x 8 images x 9 = 576
    optimizer=dict(lr=2.1e-5, weight_decay=0.1),
    clip_grad=dict(max_norm=100.0),
)
auto_scale_lr = dict(base_batch_size=64)
