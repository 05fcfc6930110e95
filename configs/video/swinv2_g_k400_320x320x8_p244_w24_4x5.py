# swinv2_g_k400_320x320x8_w24_4x5.py for a checkpoint of swinv2_g_k400_320x320x8_p244.py.
_base_ = './swinv2_g_k400_320x320x8_p244_w24.py'

model = dict(test_cfg=dict(max_testing_views=5))  # of the 20 at a time, to save memory
init, sample, decode, side, crop, *rest = _base_.test_pipeline
test_pipeline = [
    init,
    dict(sample, num_clips=4),
    *(decode, side),
    dict(crop, type='swinv2_mm.datasets.video.FiveCrop'),
    *rest,
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
