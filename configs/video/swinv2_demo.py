# A nano SwinV2 for video, trained from scratch on the clips of tools/misc/make_motion_clips.py. `make demo-video` runs
# it on a CPU. It has all parts of swinv2_t_k400_224x224x32.py; size and schedule differ.
#   python tools/misc/make_motion_clips.py data/motion_clips
#   tools/dist_train.sh configs/video/swinv2_demo.py 2
_base_ = [
    '../_base_/models/recognizer_swinv2.py',
    '../_base_/datasets/kinetics400_224x224x32.py',
    '../_base_/schedules/adamw_30e.py',
    '../_base_/default_runtime_video.py',
]
from swinv2_mm.scope import add_scope

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=32, depths=(2, 2), num_heads=(2, 4)),
        patch_size=(4, 8, 8),  # half a clip; with 1 or 2 frames, it takes many more steps to learn motion
        window_size=(2, 4, 4),
        drop_path_rate=0.0,
        out_indices=(1,),
    ),
    cls_head=dict(in_channels=64, num_classes=4, dropout_ratio=0.0, topk=(1,)),
)

# Data: whole clips, not augmented. A flip would turn a class into another one.
data_root = 'data/motion_clips/'
train_pipeline = val_pipeline = test_pipeline = add_scope(
    'mmaction',
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len=8, frame_interval=1, num_clips=1, test_mode=True),
    dict(type='DecordDecode'),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='PackActionInputs'),
)
train_dataloader = dict(
    num_workers=0,  # training takes all cores of a small machine
    dataset=dict(data_root=data_root, ann_file='train.txt', data_prefix=dict(video='train'), pipeline=test_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    dataset=dict(data_root=data_root, ann_file='val.txt', data_prefix=dict(video='val'), pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(metric_options=dict(top_k_accuracy=dict(topk=(1,))))
test_evaluator = val_evaluator

# Schedule: 1128 steps of 16 clips. Training from scratch takes a much larger learning rate than fine-tuning.
max_epochs = 6
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=3e-3, betas=(0.9, 0.98)), clip_grad=dict(max_norm=5))
param_scheduler = add_scope(
    'mmaction',
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=0.5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, begin=0, end=max_epochs, T_max=max_epochs),
)
randomness = dict(seed=0)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_epochs, save_best=None))
