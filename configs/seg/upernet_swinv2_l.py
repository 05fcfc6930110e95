# UperNet on SwinV2-L (A2.1): 640x640, window 40, lr 6e-5 for 64 images, 40,000 steps of which 375 are warm-up, drop
# path 0.3. Backbone from ImageNet-22K at 192x192 with window 12. Paper: 55.9 mIoU on val at several scales (Table 4),
# here --tta.
#   tools/dist_train.sh configs/seg/upernet_swinv2_l.py 8
#   tools/dist_test.sh configs/seg/upernet_swinv2_l.py CHECKPOINT 8 --tta
# The paper states no layer-wise decay for L, and there is none.
_base_ = [
    '../_base_/models/upernet_swinv2.py',
    '../_base_/datasets/ade20k_640x640.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/default_runtime_seg.py',
]
from swinv2_mm.scope import add_scope

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        arch='large',
        window_size=40,
        pretrained_window_sizes=(12, 12, 12, 6),
        drop_path_rate=0.3,
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='swinv2://large_window12_192_22k'),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
train_dataloader = dict(batch_size=8)  # 8 GPUs x 8 images = 64
auto_scale_lr = dict(enable=False, base_batch_size=64)
steps = 40_000
train_cfg = dict(max_iters=steps, val_interval=steps // 10)
param_scheduler = add_scope(
    'mmseg',
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=375),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=375, end=steps),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5))
default_hooks = dict(checkpoint=dict(interval=steps // 10))
