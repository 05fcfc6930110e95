# Mask2Former for panoptic segmentation on SwinV2-L, 100 epochs: mmdet's recipe for Swin V1, with its backbone replaced.
# No published result. Window 16, that of the paper for images of this size (A1). Backbone from ImageNet-22K at 192x192
# with window 12.
#   tools/dist_train.sh configs/det/mask2former_swinv2_l_panoptic.py 8 --cfg-options train_dataloader.batch_size=2
# A step takes 16 images, here on 8 GPUs. Without the option the config is one for 16 GPUs.
_base_ = 'mmdet::mask2former/mask2former_swin-l-p4-w12-384-in21k_16xb1-lsj-100e_coco-panoptic.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='swinv2_mm.SwinTransformerV2',
        arch='large',
        window_size=16,
        pretrained_window_sizes=(12, 12, 12, 6),
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='swinv2://large_window12_192_22k'),
    ),
)
# the learning rates of the base stay; its keys for blocks of Swin V1 match nothing here
optim_wrapper = dict(constructor='swinv2_mm.SwinV2OptimWrapperConstructor')
default_hooks = dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook'))
custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
