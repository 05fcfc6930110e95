# SwinV2-T on ImageNet-1K at 256x256 with window 8 (A1; official swinv2_tiny_patch4_window8_256.yaml): lr 1e-3 for 1024
# images, 300 epochs, drop path 0.2. Published: 81.8 top-1.
#   tools/dist_train.sh configs/cls/swinv2_t_in1k_256.py 8
#   tools/dist_test.sh configs/cls/swinv2_t_in1k_256.py swinv2://tiny_window8_256 8
_base_ = [
    '../_base_/models/classifier_swinv2.py',
    '../_base_/datasets/imagenet_256.py',
    '../_base_/schedules/adamw_300e.py',
    '../_base_/default_runtime_cls.py',
]

model = dict(backbone=dict(window_size=8, drop_path_rate=0.2))
