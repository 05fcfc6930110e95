# SwinV2-S on Kinetics-400, as swinv2_t_k400_224x224x32.py.
_base_ = './swinv2_t_k400_224x224x32.py'

model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint='swinv2://small_window8_256')))
