# Mask2Former on SwinV2-L, ADE20K: mmseg's recipe for Swin V1, with its backbone replaced. No published result. Window
# 40, that of the paper for crops of 640x640 (A2.1). Backbone from ImageNet-22K at 192x192 with window 12.
#   tools/dist_train.sh configs/seg/mask2former_swinv2_l_ade20k.py 8
_base_ = 'mmseg::mask2former/mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='swinv2_mm.SwinTransformerV2',
        arch='large',
        window_size=40,
        pretrained_window_sizes=(12, 12, 12, 6),
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='swinv2://large_window12_192_22k'),
    ),
)
# the learning rates of the base stay; its keys for blocks of Swin V1 match nothing here
optim_wrapper = dict(constructor='swinv2_mm.SwinV2OptimWrapperConstructor')
default_hooks = dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', max_keep_ckpts=2))
custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
