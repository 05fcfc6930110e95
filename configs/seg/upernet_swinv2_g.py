# UperNet on SwinV2-G (A2.2): 640x640, window 40, lr 4e-5 for 32 images, 80,000 steps. The paper has 59.1 mIoU on val
# (Table 4). Sequential self-attention in the first two stages, activation checkpointing and split states, as
# htc_swinv2_g.py has them.
#   tools/dist_train.sh configs/seg/upernet_swinv2_g.py 8
_base_ = ['./upernet_swinv2_l.py', '../_base_/memory/fsdp.py']

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
warmup, decay = _base_.param_scheduler
param_scheduler = [dict(warmup, end=750), dict(decay, begin=750, end=steps)]
optim_wrapper = dict(optimizer=dict(lr=4e-5))
default_hooks = dict(checkpoint=dict(interval=steps // 10))
