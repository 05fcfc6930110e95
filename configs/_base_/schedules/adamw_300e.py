# AdamW with weight decay 0.05 and gradients clipped at a norm of 5; 300 epochs with 1024 images a step, 20 of them
# warm-up, then cosine decay to 1 % of the learning rate (A1; warm-up and end from the official config.py). The rate
# changes at every step, as there.
_base_ = []  # for the import, see add_scope
from swinv2_mm.scope import add_scope

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = add_scope(
    'mmpretrain',
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, begin=20, end=300, convert_to_iter_based=True),
)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,  # bf16 has the exponent range of fp32
    constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=1024)
