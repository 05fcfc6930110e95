# SwinV2-G on Kinetics-400, tested at 384x384x8 with window 24x24x8 on one view, from a checkpoint of
# swinv2_g_k400_320x320x8.py. The paper has 83.4 top-1 (Table 5).
#   tools/dist_test.sh configs/video/swinv2_g_k400_320x320x8_w24.py CHECKPOINT 8
_base_ = './swinv2_g_k400_320x320x8.py'

model = dict(backbone=dict(window_size=(8, 24, 24)))
init, sample, decode, side, crop, *rest = _base_.test_pipeline
val_pipeline = test_pipeline = [init, sample, decode, dict(side, scale=(-1, 439)), dict(crop, crop_size=384), *rest]
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
