# SwinV2-G on Kinetics-400, the first of two stages (A2.2): 256x256x8, window 16x16x8, lr 3.6e-4 for 80 clips, 20
# epochs. The second is swinv2_g_k400_320x320x8.py. Sequential self-attention in the first two stages, activation
# checkpointing and split states, as ../det/htc_swinv2_g.py has them.
#   tools/dist_train.sh configs/video/swinv2_g_k400_256x256x8.py 8
# The paper's "8(8)", length along time and window, is read as 8 frames, each a token: patches of 1x4x4. The files named
# p244 have the other reading, 8 tokens of 2 frames each.
_base_ = [
    '../_base_/models/recognizer_swinv2.py',
    '../_base_/datasets/kinetics400_256x256x8.py',
    '../_base_/schedules/adamw_30e.py',
    '../_base_/default_runtime_video.py',
    '../_base_/memory/fsdp.py',
]

model = dict(
    backbone=dict(
        arch='giant',
        patch_size=(1, 4, 4),
        window_size=(8, 16, 16),
        drop_path_rate=0.4,  # not stated; that of G on ADE20K
        with_cp=True,
        sequential_stages=(0, 1),
        init_cfg=None,  # its weights were never released
    ),
    cls_head=dict(in_channels=4096),
)
train_dataloader = dict(batch_size=10)  # 8 GPUs x 10 clips = 80
auto_scale_lr = dict(base_batch_size=80)
epochs = 20
train_cfg = dict(max_epochs=epochs)
warmup, decay = _base_.param_scheduler
param_scheduler = [warmup, dict(decay, end=epochs, T_max=epochs)]
optim_wrapper = dict(optimizer=dict(lr=3.6e-4, weight_decay=0.1))
