# SwinV2-G on Kinetics-400, as swinv2_g_k400_320x320x8_w24.py, with 4 clips x 5 crops. The paper has 86.8 top-1
# (Table 5) and does not say which crops: corners and centre here.
#   tools/dist_test.sh configs/video/swinv2_g_k400_320x320x8_w24_4x5.py CHECKPOINT 8
_base_ = './swinv2_g_k400_320x320x8_w24.py'

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
