# SwinV2-B, recipe of swinv2_t_in1k_256.py with drop path 0.5 (A1; official swinv2_base_patch4_window8_256.yaml).
# Published: 84.2 top-1.
_base_ = './swinv2_t_in1k_256.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.5), head=dict(in_channels=1024))
