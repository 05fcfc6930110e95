# SwinV2-L on Kinetics-400, as swinv2_t_k400_224x224x32.py but from ImageNet-22K at 192x192 with window 12, with Video
# Swin's weight decay for L and its learning rate for ImageNet-22K weights.
_base_ = './swinv2_t_k400_224x224x32.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.4,  # not stated for L; mmaction's
        with_cp=True,
        init_cfg=dict(checkpoint='swinv2://large_window12_192_22k'),
    ),
    cls_head=dict(in_channels=1536),
)
optim_wrapper = dict(optimizer=dict(lr=3e-4, weight_decay=0.05))
