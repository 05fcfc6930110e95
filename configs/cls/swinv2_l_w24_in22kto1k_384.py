# SwinV2-L, recipe of swinv2_b_w24_in22kto1k_384.py (A2.1; official
# swinv2_large_patch4_window12to24_192to384_22kto1k_ft.yaml). Paper: 87.7 top-1 (Table 2); the released file: 87.6.
_base_ = './swinv2_b_w24_in22kto1k_384.py'

model = dict(
    backbone=dict(arch='large', init_cfg=dict(checkpoint='swinv2://large_window12_192_22k')),
    head=dict(in_channels=1536),
)
