# SimMIM pre-training of SwinV2-G at 192x192 (A2.2): lr 1.4e-3 for 9216 images, 20 epochs of 70 M images, of which
# 30,000 steps are warm-up, then cosine decay, weight decay 0.1, gradients clipped at 100.
#   tools/dist_train.sh configs/ssl/simmim_swinv2_g_in22k_192.py 8
# The paper's 70 M images were never published; here it is ImageNet-22K, for as many steps. Not stated: window, masks,
# target and drop path (those of B), start of the warm-up and end of the decay. Memory as in
# configs/det/htc_swinv2_g.py.
_base_ = ['./simmim_swinv2_l_in1k_192.py', '../_base_/memory/fsdp.py']
from swinv2_mm.scope import add_scope

accumulate = 9  # 8 GPUs x 128 images x 9 = 9216
steps = 20 * 70_000_000 // 9216 * accumulate
model = dict(backbone=dict(arch='giant', sequential_stages=(0, 1)), neck=dict(in_channels=4096))
data_root = 'data/imagenet22k/'
train_dataloader = dict(
    batch_size=128,
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(data_root=data_root, data_prefix='images'),
)
auto_scale_lr = dict(base_batch_size=1024)
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=steps)
param_scheduler = add_scope(
    'mmpretrain',
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=30_000 * accumulate),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=False, begin=30_000 * accumulate, end=steps),
)
optim_wrapper = dict(
    accumulative_counts=accumulate,
    optimizer=dict(lr=1.4e-3, weight_decay=0.1),
    clip_grad=dict(max_norm=100.0),
)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=steps // 20))
log_processor = dict(by_epoch=False)
