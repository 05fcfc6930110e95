# SwinV2-B on Kinetics-400, as swinv2_t_k400_224x224x32.py but with the drop path and weight decay of Video Swin-B.
_base_ = './swinv2_t_k400_224x224x32.py'

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.3, init_cfg=dict(checkpoint='swinv2://base_window8_256')),
    cls_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
