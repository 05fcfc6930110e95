# SwinV2-L, recipe of swinv2_b_in22k_192.py (A2.1; official swinv2_large_patch4_window12_192_22k.yaml).
_base_ = './swinv2_b_in22k_192.py'

model = dict(backbone=dict(arch='large'), head=dict(in_channels=1536))
