# HTC++ on SwinV2-H. The paper has no such system; this is the recipe of L, see htc_swinv2_b.py (A2.1). The supervised
# weights of H were never released, and SimMIM's are of a model without extra norms.
_base_ = './htc_swinv2_l.py'

model = dict(
    backbone=dict(arch='huge', sequential_stages=(0, 1), init_cfg=None),
    neck=[
        dict(type='swinv2_mm.GlobalAttention', in_channels=2816, num_heads=88, drop_path_rate=0.2),
        dict(type='FPN', in_channels=[352, 704, 1408, 2816], out_channels=256, num_outs=5),
    ],
)
