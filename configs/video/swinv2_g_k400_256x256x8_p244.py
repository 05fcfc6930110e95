# swinv2_g_k400_256x256x8.py with the other reading of the paper's 8(8): 8 tokens along time of 2 frames each, that is
# 16 frames in patches of 2x4x4, as in Video Swin. A clip spans 64 frames in both. README.md has the keys to change in
# the other configs of G.
#   tools/dist_train.sh configs/video/swinv2_g_k400_256x256x8_p244.py 8
_base_ = './swinv2_g_k400_256x256x8.py'
from swinv2_mm.scope import add_scope

model = dict(backbone=dict(patch_size=(2, 4, 4)))
train_pipeline = add_scope(
    'mmaction',
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len=16, frame_interval=4, num_clips=1),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 293)),
    dict(type='RandomResizedCrop'),
    dict(type='Resize', scale=(256, 256), keep_ratio=False),
    dict(type='Flip', flip_ratio=0.5),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='PackActionInputs'),
)
val_pipeline = test_pipeline = add_scope(
    'mmaction',
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len=16, frame_interval=4, num_clips=1, test_mode=True),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 293)),
    dict(type='CenterCrop', crop_size=256),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='PackActionInputs'),
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
