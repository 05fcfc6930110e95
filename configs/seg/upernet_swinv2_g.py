# UperNet on SwinV2-G (A2.2): 640x640, window 40, lr 4e-5 for 32 images, 80,000 steps of which 750 are warm-up, drop
# path 0.4. Paper: 59.1 mIoU on val (Table 4).
#   tools/dist_train.sh configs/seg/upernet_swinv2_g.py 8
# Memory (Sec. 3.4): sequential self-attention in the first two stages, activation checkpointing, and FSDP where the
# paper has ZeRO-1.
_base_ = ['./upernet_swinv2_l.py', '../_base_/memory/fsdp.py']
from swinv2_mm.scope import add_scope

model = dict(
    backbone=dict(
        arch='giant',
        sequential_stages=(0, 1),
        drop_path_rate=0.4,
        init_cfg=None,  # its weights were never released
    ),
    decode_head=dict(in_channels=[512, 1024, 2048, 4096]),
    auxiliary_head=dict(in_channels=2048),
)
train_dataloader = dict(batch_size=4)  # 8 GPUs x 4 images = 32
auto_scale_lr = dict(base_batch_size=32)
steps = 80_000
train_cfg = dict(max_iters=steps, val_interval=steps // 10)
param_scheduler = add_scope(
    'mmseg',
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=750),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=750, end=steps),
)
optim_wrapper = dict(optimizer=dict(lr=4e-5))
default_hooks = dict(checkpoint=dict(interval=steps // 10))
