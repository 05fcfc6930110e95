# SwinV2-G on Kinetics-400, first of two stages (A2.2): 256x256x8, window 16x16x8, lr 3.6e-4 for 80 clips, 20 epochs of
# which 2.5 are warm-up, weight decay 0.1. swinv2_g_k400_320x320x8.py is the second stage.
#   tools/dist_train.sh configs/video/swinv2_g_k400_256x256x8.py 8
# Memory (Sec. 3.4): sequential self-attention in the first two stages, activation checkpointing, and FSDP where the
# paper has ZeRO-1.
# The paper gives 8(8) for length and window along time. Here it means 8 frames in patches of 1x4x4;
# swinv2_g_k400_256x256x8_p244.py has 16 frames in patches of 2x4x4, see README.md.
_base_ = [
    '../_base_/models/recognizer_swinv2.py',
    '../_base_/datasets/kinetics400_256x256x8.py',
    '../_base_/schedules/adamw_30e.py',
    '../_base_/default_runtime_video.py',
    '../_base_/memory/fsdp.py',
]
from swinv2_mm.scope import add_scope

model = dict(
    backbone=dict(
        arch='giant',
        patch_size=(1, 4, 4),
        window_size=(8, 16, 16),
        drop_path_rate=0.4,  # not stated; that of G on ADE20K
        with_cp=True,
        sequential_stages=(0, 1),
        init_cfg=None,  # its weights were never released
    ),
    cls_head=dict(in_channels=4096),
)
train_dataloader = dict(batch_size=10)  # 8 GPUs x 10 clips = 80
auto_scale_lr = dict(base_batch_size=80)
epochs = 20
train_cfg = dict(max_epochs=epochs)
param_scheduler = add_scope(
    'mmaction',
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=2.5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, begin=0, end=epochs, T_max=epochs),
)
optim_wrapper = dict(optimizer=dict(lr=3.6e-4, weight_decay=0.1))
