# swinv2_g_k400_320x320x8_w24.py for a checkpoint of swinv2_g_k400_320x320x8_p244.py.
_base_ = './swinv2_g_k400_320x320x8_p244.py'

model = dict(backbone=dict(window_size=(8, 24, 24)))
init, sample, decode, side, crop, *rest = _base_.test_pipeline
val_pipeline = test_pipeline = [init, sample, decode, dict(side, scale=(-1, 439)), dict(crop, crop_size=384), *rest]
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
