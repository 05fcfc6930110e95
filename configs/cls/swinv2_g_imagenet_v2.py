# SwinV2-G of swinv2_g_w40_in22kto1k_640.py, tested on ImageNet-V2 (matched frequency). Paper: 84.00 top-1 (Table 2).
#   tools/dist_test.sh configs/cls/swinv2_g_imagenet_v2.py CHECKPOINT 8
_base_ = './swinv2_g_w40_in22kto1k_640.py'

data_root = 'data/imagenetv2-matched-frequency-format-val/'
test_dataloader = dict(
    dataset=dict(type='swinv2_mm.datasets.imagenet_v2.ImageNetV2', data_root=data_root, split=''),
)
