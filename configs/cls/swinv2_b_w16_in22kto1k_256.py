# SwinV2-B from ImageNet-22K (192x192, window 12), fine-tuned on ImageNet-1K at 256x256 with window 16 (A2.1; official
# swinv2_base_patch4_window12to16_192to256_22kto1k_ft.yaml): lr 4e-5 for 1024 images, 30 epochs, drop path 0.2.
# Published: 86.2 top-1.
#   tools/dist_train.sh configs/cls/swinv2_b_w16_in22kto1k_256.py 8
#   tools/dist_test.sh configs/cls/swinv2_b_w16_in22kto1k_256.py swinv2://base_window12to16_192to256_22kto1k 8
# The official code starts the head from the rows of the 1000 classes in that of ImageNet-22K. Here it starts fresh.
_base_ = [
    '../_base_/models/classifier_swinv2.py',
    '../_base_/datasets/imagenet_256.py',
    '../_base_/schedules/adamw_finetune_30e.py',
    '../_base_/default_runtime_cls.py',
]

model = dict(
    backbone=dict(
        arch='base',
        window_size=(16, 16, 16, 8),
        pretrained_window_sizes=(12, 12, 12, 6),
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='swinv2://base_window12_192_22k'),
    ),
    head=dict(in_channels=1024),
)
