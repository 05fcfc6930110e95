# Mask2Former for instance segmentation on SwinV2-T: mmdet's recipe for Swin V1, with its backbone replaced. No
# published result. Window 16, that of the paper for images of this size (A1). Backbone from ImageNet-1K at 256x256 with
# window 8.
#   tools/dist_train.sh configs/det/mask2former_swinv2_t.py 8
_base_ = 'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='swinv2_mm.SwinTransformerV2',
        arch='tiny',
        window_size=16,
        pretrained_window_sizes=8,
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='swinv2://tiny_window8_256'),
    ),
)
# the learning rates of the base stay; its keys for blocks of Swin V1 match nothing here
optim_wrapper = dict(constructor='swinv2_mm.SwinV2OptimWrapperConstructor')
default_hooks = dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook'))
custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
# mmdet's config of instances still names the folders of panoptic segmentation
train_dataloader = dict(dataset=dict(data_prefix=dict(_delete_=True, img='train2017/')))
val_dataloader = dict(dataset=dict(data_prefix=dict(_delete_=True, img='val2017/')))
test_dataloader = val_dataloader
