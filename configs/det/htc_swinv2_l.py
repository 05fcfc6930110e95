# HTC++ on SwinV2-L, recipe of htc_swinv2_b.py (A2.1). Paper: 58.8 box AP and 51.1 mask AP on val (Table 3).
_base_ = './htc_swinv2_b.py'

model = dict(
    backbone=dict(arch='large', init_cfg=dict(checkpoint='swinv2://large_window12_192_22k')),
    neck=[
        dict(type='swinv2_mm.GlobalAttention', in_channels=1536, num_heads=48, drop_path_rate=0.2),
        dict(type='FPN', in_channels=[192, 384, 768, 1536], out_channels=256, num_outs=5),
    ],
)
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(accumulative_counts=8)  # 8 GPUs x 1 image x 8 = 64
auto_scale_lr = dict(base_batch_size=8)
