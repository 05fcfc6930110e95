# SwinV2-G on Kinetics-400, as swinv2_g_k400_320x320x8_w24.py but on 4 clips x 5 crops. Paper: 86.8 top-1 (Table 5). The
# paper does not state which crops; here they are the four corners and the centre.
#   tools/dist_test.sh configs/video/swinv2_g_k400_320x320x8_w24_4x5.py CHECKPOINT 8
_base_ = './swinv2_g_k400_320x320x8_w24.py'
from swinv2_mm.scope import add_scope

model = dict(test_cfg=dict(max_testing_views=5))  # views per forward pass, of 20; limits memory
test_pipeline = add_scope(
    'mmaction',
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len=8, frame_interval=8, num_clips=4, test_mode=True),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 439)),
    dict(type='swinv2_mm.datasets.video.FiveCrop', crop_size=384),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='PackActionInputs'),
)
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
