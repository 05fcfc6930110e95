# swinv2_g_k400_320x320x8.py with the other reading of the paper's "8(8)": 8 tokens along time of 2 frames each,
# thus 16 frames in patches of 2x4x4, as Video Swin has them. They reach over 64 frames as well.
_base_ = './swinv2_g_k400_320x320x8.py'

model = dict(backbone=dict(patch_size=(2, 4, 4)))
init, sample, *rest = _base_.train_pipeline
train_pipeline = [init, dict(sample, clip_len=16, frame_interval=4), *rest]
init, sample, *rest = _base_.test_pipeline
val_pipeline = test_pipeline = [init, dict(sample, clip_len=16, frame_interval=4), *rest]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
