# AdamW with weight decay 0.05; 160,000 steps of 16 images, 1500 of them warm-up, then linear decay (A1). The configs of
# L and G see as many images in fewer steps, and set learning rate, warm-up and number of steps.
_base_ = 'mmseg::_base_/schedules/schedule_160k.py'
from swinv2_mm.scope import add_scope

param_scheduler = add_scope(
    'mmseg',
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160_000),
)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,  # bf16 has the exponent range of fp32
    constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=4e-5, weight_decay=0.05),
)
default_hooks = dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', max_keep_ckpts=2))
