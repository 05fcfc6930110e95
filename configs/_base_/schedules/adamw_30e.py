# AdamW, 30 epochs with a linear warm-up of 2.5 epochs and cosine decay (Video Swin, arXiv 2106.13230). The config that
# inherits it sets learning rate and weight decay.
_base_ = []  # for the import, see add_scope
from swinv2_mm.scope import add_scope

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=30, val_interval=3)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = add_scope(
    'mmaction',
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=2.5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, begin=0, end=30, T_max=30),
)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,  # bf16 has the exponent range of fp32
    constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
)
auto_scale_lr = dict(enable=False, base_batch_size=64)
