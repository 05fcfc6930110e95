# DINO on SwinV2-T, recipe of dino_5scale_swinv2_l.py without activation checkpointing; mmdet has none for T. No
# published result. Backbone from ImageNet-1K at 256x256 with window 8.
#   tools/dist_train.sh configs/det/dino_5scale_swinv2_t.py 8
_base_ = './dino_5scale_swinv2_l.py'

model = dict(
    backbone=dict(
        arch='tiny',
        pretrained_window_sizes=8,
        with_cp=False,
        init_cfg=dict(checkpoint='swinv2://tiny_window8_256'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
