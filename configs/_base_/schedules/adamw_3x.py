# AdamW, weight decay 0.05 and 3x for all of the paper's COCO systems (A1, A2.1). A leaf gives the learning rate.
# Not stated, and taken from Swin V1's detection configs: warm-up of 1000 iterations (before gradient accumulation),
# steps at epochs 27 and 33. No gradient clipping is stated, and none is used.
_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(_scope_='mmdet', type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(_scope_='mmdet', type='MultiStepLR', begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,  # bf16 has the exponents of fp32
    constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05),
)
