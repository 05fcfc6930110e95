# SwinV2-G on Kinetics-400, tested at 384x384x8 with window 24x24x8 on one view, from a checkpoint of
# swinv2_g_k400_320x320x8.py. Paper: 83.4 top-1 (Table 5).
#   tools/dist_test.sh configs/video/swinv2_g_k400_320x320x8_w24.py CHECKPOINT 8
_base_ = './swinv2_g_k400_320x320x8.py'
from swinv2_mm.scope import add_scope

model = dict(backbone=dict(window_size=(8, 24, 24)))
val_pipeline = test_pipeline = add_scope(
    'mmaction',
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len=8, frame_interval=8, num_clips=1, test_mode=True),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 439)),
    dict(type='CenterCrop', crop_size=384),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='PackActionInputs'),
)
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
