# HTC++ on SwinV2-S. The paper has no such system; this is the recipe of B and L, see htc_swinv2_b.py (A2.1). Backbone
# from ImageNet-1K at 256x256 with window 8.
_base_ = './htc_swinv2_t.py'

model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint='swinv2://small_window8_256')))
