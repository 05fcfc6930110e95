# AdamW with weight decay 0.05, 3x schedule (36 epochs), for all COCO systems of the paper (A1, A2.1). The config that
# inherits it sets the learning rate. Not stated, and taken from Swin V1's detection configs: warm-up of 1000 iterations
# (not multiplied by gradient accumulation), learning rate steps at epochs 27 and 33. The paper states no gradient
# clipping, and there is none.
_base_ = 'mmdet::_base_/schedules/schedule_1x.py'
from swinv2_mm.scope import add_scope

train_cfg = dict(max_epochs=36)
param_scheduler = add_scope(
    'mmdet',
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,  # bf16 has the exponent range of fp32
    constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05),
)
