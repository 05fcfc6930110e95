# HTC++ on SwinV2-T. The paper has no such system; this is the recipe of B and L, see htc_swinv2_b.py (A2.1). Backbone
# from ImageNet-1K at 256x256 with window 8.
_base_ = './htc_swinv2_b.py'

model = dict(
    backbone=dict(arch='tiny', pretrained_window_sizes=8, init_cfg=dict(checkpoint='swinv2://tiny_window8_256')),
    neck=[
        dict(type='swinv2_mm.GlobalAttention', in_channels=768, num_heads=24, drop_path_rate=0.2),
        dict(type='FPN', in_channels=[96, 192, 384, 768], out_channels=256, num_outs=5),
    ],
)
