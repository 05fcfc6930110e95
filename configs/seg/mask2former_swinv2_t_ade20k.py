# Mask2Former on SwinV2-T, ADE20K: mmseg's recipe for Swin V1, with its backbone replaced. No published result. Window
# 16, that of the paper for crops of 512x512 (A1). Backbone from ImageNet-1K at 256x256 with window 8.
#   tools/dist_train.sh configs/seg/mask2former_swinv2_t_ade20k.py 8
_base_ = 'mmseg::mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py'

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
default_hooks = dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', max_keep_ckpts=2))
custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
