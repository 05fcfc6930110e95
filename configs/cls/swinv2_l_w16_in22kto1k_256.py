# SwinV2-L, recipe of swinv2_b_w16_in22kto1k_256.py (A2.1; official
# swinv2_large_patch4_window12to16_192to256_22kto1k_ft.yaml). Published: 86.9 top-1.
_base_ = './swinv2_b_w16_in22kto1k_256.py'

model = dict(
    backbone=dict(arch='large', init_cfg=dict(checkpoint='swinv2://large_window12_192_22k')),
    head=dict(in_channels=1536),
)
train_dataloader = dict(batch_size=64)
val_dataloader = dict(batch_size=64)
test_dataloader = val_dataloader
optim_wrapper = dict(accumulative_counts=2)  # 8 GPUs x 64 images x 2 = 1024
auto_scale_lr = dict(base_batch_size=512)
