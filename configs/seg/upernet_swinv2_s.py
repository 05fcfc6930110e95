# UperNet on SwinV2-S, recipe of upernet_swinv2_t.py (A1).
_base_ = './upernet_swinv2_t.py'

model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint='swinv2://small_window8_256')))
