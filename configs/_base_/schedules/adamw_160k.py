# AdamW, weight decay 0.05, linear decay and 160,000 steps of 16 images after a warm-up of 1500 (A1). The larger systems
# see as many images in fewer steps; their leaves give lr, warm-up and length.
_base_ = 'mmseg::_base_/schedules/schedule_160k.py'

param_scheduler = [
    dict(_scope_='mmseg', type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(_scope_='mmseg', type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160_000),
]
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,  # bf16 has the exponents of fp32
    constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=4e-5, weight_decay=0.05),
)
default_hooks = dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', max_keep_ckpts=2))
