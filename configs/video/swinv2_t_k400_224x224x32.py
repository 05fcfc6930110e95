# SwinV2-T on Kinetics-400 by the recipe of Video Swin (arXiv 2106.13230): 32 frames of 224x224, patches of 2x4x4,
# window 8x7x7, lr 1e-3 (backbone 1e-4) for 64 clips, 30 epochs. Backbone from ImageNet-1K at 256x256 with window 8,
# inflated. Video Swin-T has 78.8 top-1 with 4x3 views; neither paper has Swin V2 at this size.
#   tools/dist_train.sh configs/video/swinv2_t_k400_224x224x32.py 8
_base_ = [
    '../_base_/models/recognizer_swinv2.py',
    '../_base_/datasets/kinetics400_224x224x32.py',
    '../_base_/schedules/adamw_30e.py',
    '../_base_/default_runtime_video.py',
]

model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='swinv2://tiny_window8_256'),
    ),
)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}),
    optimizer=dict(weight_decay=0.02),
)
