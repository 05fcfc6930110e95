# Faster R-CNN on SwinV2-T, 12 epochs: mmdet's config for ResNet-50, with the backbone replaced, and with optimizer,
# warm-up and drop path of mmdet's Mask R-CNN on Swin V1. No published result. Window 16, that of the paper for images
# of this size (A1). Backbone from ImageNet-1K at 256x256 with window 8.
#   tools/dist_train.sh configs/det/faster_rcnn_swinv2_t.py 8
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
from swinv2_mm.scope import add_scope

model = dict(
    backbone=dict(
        _delete_=True,
        type='swinv2_mm.SwinTransformerV2',
        arch='tiny',
        window_size=16,
        pretrained_window_sizes=8,
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='swinv2://tiny_window8_256'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
train_dataloader = dict(persistent_workers=False)  # for ReproducibleResumeHook
param_scheduler = add_scope(
    'mmdet',
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
)
optim_wrapper = dict(
    constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05),
)
default_hooks = dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', max_keep_ckpts=2))
custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
