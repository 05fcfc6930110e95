# AdamW, 800 epochs of 2048 images a step: a linear warm-up of 10 epochs, and a tenth of the learning rate from epoch
# 700 on. These are SimMIM's official settings (lr 1e-4 for 512 images).
_base_ = []  # for the import, see add_scope
from swinv2_mm.scope import add_scope

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=800)
param_scheduler = add_scope(
    'mmpretrain',
    dict(type='LinearLR', start_factor=0.005, by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=800, milestones=[700], gamma=0.1),
)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,  # bf16 has the exponent range of fp32
    constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=4e-4, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=2048)
