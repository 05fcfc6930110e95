# SwinV2-G on Kinetics-400, second stage (A2.2): 320x320x8, window 20x20x8, lr 5e-5 for 64 clips, 5 epochs of which 1 is
# warm-up, from the last checkpoint of swinv2_g_k400_256x256x8.py. Paper: 83.2 top-1 with one view (Table 5).
#   tools/dist_train.sh configs/video/swinv2_g_k400_320x320x8.py 8 --cfg-options load_from=CHECKPOINT
_base_ = './swinv2_g_k400_256x256x8.py'
from swinv2_mm.scope import add_scope

model = dict(backbone=dict(window_size=(8, 20, 20)))
train_pipeline = add_scope(
    'mmaction',
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len=8, frame_interval=8, num_clips=1),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 366)),
    dict(type='RandomResizedCrop'),
    dict(type='Resize', scale=(320, 320), keep_ratio=False),
    dict(type='Flip', flip_ratio=0.5),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='PackActionInputs'),
)
val_pipeline = test_pipeline = add_scope(
    'mmaction',
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len=8, frame_interval=8, num_clips=1, test_mode=True),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 366)),
    dict(type='CenterCrop', crop_size=320),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='PackActionInputs'),
)
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))  # 8 GPUs x 8 clips = 64
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
auto_scale_lr = dict(base_batch_size=64)
epochs = 5
train_cfg = dict(max_epochs=epochs, val_interval=1)
param_scheduler = add_scope(
    'mmaction',
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, begin=0, end=epochs, T_max=epochs),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
