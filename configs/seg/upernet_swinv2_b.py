# UperNet on SwinV2-B, recipe of upernet_swinv2_t.py (A1).
_base_ = './upernet_swinv2_t.py'

model = dict(
    backbone=dict(arch='base', init_cfg=dict(checkpoint='swinv2://base_window8_256')),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
