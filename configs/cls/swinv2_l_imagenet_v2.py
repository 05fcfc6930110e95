# SwinV2-L of swinv2_l_w24_in22kto1k_384.py, tested on ImageNet-V2 (matched frequency). Paper: 78.31 top-1 (Table 2).
#   tools/dist_test.sh configs/cls/swinv2_l_imagenet_v2.py swinv2://large_window12to24_192to384_22kto1k 8
_base_ = './swinv2_l_w24_in22kto1k_384.py'

data_root = 'data/imagenetv2-matched-frequency-format-val/'
test_dataloader = dict(
    dataset=dict(type='swinv2_mm.datasets.imagenet_v2.ImageNetV2', data_root=data_root, split=''),
)
