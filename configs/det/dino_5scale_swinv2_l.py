# DINO on SwinV2-L, 12 epochs: mmdet's recipe for Swin V1, with its backbone replaced, and without weight decay for
# norms and biases. No published result. Window 16, that of the paper for images of this size (A1). Backbone from
# ImageNet-22K at 192x192 with window 12.
#   tools/dist_train.sh configs/det/dino_5scale_swinv2_l.py 8
_base_ = 'mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='swinv2_mm.SwinTransformerV2',
        arch='large',
        window_size=16,
        pretrained_window_sizes=(12, 12, 12, 6),
        drop_path_rate=0.2,
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='swinv2://large_window12_192_22k'),
    ),
)
train_dataloader = dict(persistent_workers=False)  # for ReproducibleResumeHook
optim_wrapper = dict(constructor='swinv2_mm.SwinV2OptimWrapperConstructor')
default_hooks = dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', max_keep_ckpts=2))
custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
