# SwinV2-S, recipe of swinv2_t_in1k_256.py with drop path 0.3 (A1; official swinv2_small_patch4_window8_256.yaml).
# Published: 83.7 top-1.
_base_ = './swinv2_t_in1k_256.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.3))
