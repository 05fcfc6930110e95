# A nano SwinV2 for video, from scratch, on the clips of tools/misc/make_motion_clips.py: `make demo-video`, on a CPU.
# The recognizer of swinv2_t_k400_224x224x32.py with all its parts; what differs is size and schedule.
#   python tools/misc/make_motion_clips.py data/motion_clips
#   tools/dist_train.sh configs/video/swinv2_demo.py 2
_base_ = [
    '../_base_/models/recognizer_swinv2.py',
    '../_base_/datasets/kinetics400_224x224x32.py',
    '../_base_/schedules/adamw_30e.py',
    '../_base_/default_runtime_video.py',
]

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=32, depths=(2, 2), num_heads=(2, 4)),
        patch_size=(4, 8, 8),  # half a clip: with 1 or 2 frames, motion takes many more steps to be found
        window_size=(2, 4, 4),
        drop_path_rate=0.0,
        out_indices=(1,),
    ),
    cls_head=dict(in_channels=64, num_classes=4, dropout_ratio=0.0, topk=(1,)),
)

# Data: whole clips as they are. A flip would turn a class into another one.
data_root = 'data/motion_clips/'
train_pipeline = val_pipeline = test_pipeline = [
    dict(_scope_='mmaction', type='DecordInit'),
    dict(_scope_='mmaction', type='SampleFrames', clip_len=8, frame_interval=1, num_clips=1, test_mode=True),
    dict(_scope_='mmaction', type='DecordDecode'),
    dict(_scope_='mmaction', type='FormatShape', input_format='NCTHW'),
    dict(_scope_='mmaction', type='PackActionInputs'),
]
train_dataloader = dict(
    num_workers=0,  # the cores are busy with the training itself
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

# Schedule: 1128 steps of 16 clips. From scratch the learning rate is far above that of a fine-tuning.
max_epochs = 6
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=3e-3, betas=(0.9, 0.98)), clip_grad=dict(max_norm=5))
warmup, decay = _base_.param_scheduler
param_scheduler = [dict(warmup, start_factor=0.01, end=0.5), dict(decay, end=max_epochs, T_max=max_epochs)]
randomness = dict(seed=0)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_epochs, save_best=None))
