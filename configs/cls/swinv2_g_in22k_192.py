# SwinV2-G, supervised pre-training at 192x192 after SimMIM (A2.2): lr 1.4e-3 for 9216 images with a layer-wise decay of
# 0.87, 30 epochs of which 20,000 steps are warm-up, weight decay 0.1, gradients clipped at 100, drop path 0.3,
# RandAugment and random erasing.
#   tools/dist_train.sh configs/cls/swinv2_g_in22k_192.py 8 \
#       --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=CHECKPOINT
# The paper's 70 M images were never published; here it is ImageNet-22K, for as many steps. Not stated: the window (that
# of B and L), the number of classes, label smoothing, the start of the warm-up and the end of the decay (the official
# code's). No Mixup and no CutMix: the paper lists the augmentation, without them. Memory as in
# configs/det/htc_swinv2_g.py.
_base_ = ['./swinv2_l_in22k_192.py', '../_base_/memory/fsdp.py']
from swinv2_mm.scope import add_scope

accumulate = 24  # 8 GPUs x 48 images x 24 = 9216
steps = 30 * 70_000_000 // 9216 * accumulate
model = dict(
    backbone=dict(arch='giant', drop_path_rate=0.3, with_cp=True, sequential_stages=(0, 1)),
    head=dict(in_channels=4096),
    train_cfg=None,
)
train_dataloader = dict(batch_size=48, sampler=dict(type='InfiniteSampler'))
val_dataloader = dict(batch_size=48)
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=384)
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=steps, val_interval=steps // 30)
param_scheduler = add_scope(
    'mmpretrain',
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20_000 * accumulate),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=False, begin=20_000 * accumulate, end=steps),
)
optim_wrapper = dict(
    accumulative_counts=accumulate,
    constructor='swinv2_mm.LearningRateDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.87),
    optimizer=dict(lr=1.4e-3),
    clip_grad=dict(max_norm=100.0),
)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=steps // 30))
log_processor = dict(by_epoch=False)
