# RetinaNet on SwinV2-T, 12 epochs: mmdet's config for Swin V1, with its backbone replaced, and with the AdamW of
# mmdet's Mask R-CNN on Swin V1 instead of SGD. No published result. Window 16, that of the paper for images of this
# size (A1). Backbone from ImageNet-1K at 256x256 with window 8.
#   tools/dist_train.sh configs/det/retinanet_swinv2_t.py 8
_base_ = 'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='swinv2_mm.SwinTransformerV2',
        arch='tiny',
        window_size=16,
        pretrained_window_sizes=8,
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint='swinv2://tiny_window8_256'),
    ),
)
train_dataloader = dict(persistent_workers=False)  # for ReproducibleResumeHook
optim_wrapper = dict(
    constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05),
)
default_hooks = dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', max_keep_ckpts=2))
custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
