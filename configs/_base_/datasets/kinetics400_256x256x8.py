# Kinetics-400 as in the first stage of SwinV2-G (A2.2): 8 frames of 256x256, tested on one view. Not stated, and as
# Video Swin has it: random crops from a shorter side of 8/7 of their size, flips, and clips that reach over 64 frames,
# of which every eighth is taken.
_base_ = './kinetics400_224x224x32.py'

train_pipeline = [
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len=8, frame_interval=8, num_clips=1),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 293)),
    dict(type='RandomResizedCrop'),
    dict(type='Resize', scale=(256, 256), keep_ratio=False),
    dict(type='Flip', flip_ratio=0.5),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='PackActionInputs'),
]
test_pipeline = [
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len=8, frame_interval=8, num_clips=1, test_mode=True),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 293)),
    dict(type='CenterCrop', crop_size=256),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='PackActionInputs'),
]
# as mmengine would stamp another scope on a pipeline that is taken from `_base_ = 'swinv2_mm::...'`
train_pipeline = [dict(t, _scope_='mmaction') for t in train_pipeline]
val_pipeline = test_pipeline = [dict(t, _scope_='mmaction') for t in test_pipeline]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
