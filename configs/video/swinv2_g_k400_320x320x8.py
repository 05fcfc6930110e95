# SwinV2-G on Kinetics-400, the second stage (A2.2): 320x320x8, window 20x20x8, lr 5e-5 for 64 clips, 5 epochs, from the
# last checkpoint of swinv2_g_k400_256x256x8.py. The paper has 83.2 top-1 with one view (Table 5).
#   tools/dist_train.sh configs/video/swinv2_g_k400_320x320x8.py 8 --cfg-options load_from=CHECKPOINT
_base_ = './swinv2_g_k400_256x256x8.py'

model = dict(backbone=dict(window_size=(8, 20, 20)))
init, sample, decode, side, random_crop, size, *rest = _base_.train_pipeline
train_pipeline = [
    *(init, sample, decode),
    dict(side, scale=(-1, 366)),
    random_crop,
    dict(size, scale=(320, 320)),
    *rest,
]
init, sample, decode, side, crop, *rest = _base_.test_pipeline
val_pipeline = test_pipeline = [init, sample, decode, dict(side, scale=(-1, 366)), dict(crop, crop_size=320), *rest]
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))  # 8 GPUs x 8 clips = 64
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
auto_scale_lr = dict(base_batch_size=64)
epochs = 5
train_cfg = dict(max_epochs=epochs, val_interval=1)
warmup, decay = _base_.param_scheduler
param_scheduler = [dict(warmup, end=1), dict(decay, end=epochs, T_max=epochs)]
optim_wrapper = dict(optimizer=dict(lr=5e-5))
