# SwinV2-B from ImageNet-22K, fine-tuned as swinv2_b_w16_in22kto1k_256.py but at 384x384 with window 24 (A2.1; official
# swinv2_base_patch4_window12to24_192to384_22kto1k_ft.yaml). Paper: 87.1 top-1 (Table 2).
#   tools/dist_train.sh configs/cls/swinv2_b_w24_in22kto1k_384.py 8
#   tools/dist_test.sh configs/cls/swinv2_b_w24_in22kto1k_384.py swinv2://base_window12to24_192to384_22kto1k 8
_base_ = [
    '../_base_/models/classifier_swinv2.py',
    '../_base_/datasets/imagenet_384.py',
    '../_base_/schedules/adamw_finetune_30e.py',
    '../_base_/default_runtime_cls.py',
]

model = dict(
    backbone=dict(
        arch='base',
        window_size=(24, 24, 24, 12),
        pretrained_window_sizes=(12, 12, 12, 6),
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='swinv2://base_window12_192_22k'),
    ),
    head=dict(in_channels=1024),
)
optim_wrapper = dict(accumulative_counts=4)  # 8 GPUs x 32 images x 4 = 1024
auto_scale_lr = dict(base_batch_size=256)
