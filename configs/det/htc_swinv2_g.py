# HTC++ on SwinV2-G (A2.2): 1536x1536, window 32, lr 6e-4 for 96 images, 45,000 steps, from the last checkpoint of
# htc_swinv2_g_objects365.py. Paper: 61.7 box AP and 53.3 mask AP on val (Table 3).
#   tools/dist_train.sh configs/det/htc_swinv2_g.py 8 --cfg-options load_from=CHECKPOINT
# Memory (Sec. 3.4): sequential self-attention in the first two stages (the backends other than 'reference' do this in
# all stages), activation checkpointing, and FSDP where the paper has ZeRO-1. FSDP also shards parameters and gradients,
# which fits 8 GPUs of 40 GB, see docs/large_models.md.
_base_ = ['./htc_swinv2_l.py', '../_base_/memory/fsdp.py']
from swinv2_mm.scope import add_scope

accumulate = 12  # 8 GPUs x 1 image x 12 = 96
steps = 45_000 * accumulate
model = dict(
    backbone=dict(
        arch='giant',
        sequential_stages=(0, 1),
        drop_path_rate=0.4,  # not stated; that of G on ADE20K
        init_cfg=None,  # its weights were never released
    ),
    neck=[
        dict(type='swinv2_mm.GlobalAttention', in_channels=4096, num_heads=128, drop_path_rate=0.4),
        dict(type='FPN', in_channels=[512, 1024, 2048, 4096], out_channels=256, num_outs=5),
    ],
)
train_dataloader = dict(sampler=dict(type='InfiniteSampler'))
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=steps, val_interval=steps // 36)
param_scheduler = add_scope(
    'mmdet',
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000 * accumulate),
    dict(
        type='MultiStepLR',
        begin=0,
        end=steps,
        by_epoch=False,
        milestones=[steps * 27 // 36, steps * 33 // 36],  # epochs 27 and 33 of 36
        gamma=0.1,
    ),
)
optim_wrapper = dict(
    accumulative_counts=accumulate,
    optimizer=dict(lr=6e-4),
    # not stated for G; that of L, which has the same lr per image
    paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}),
)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=steps // 36))
log_processor = dict(by_epoch=False)
