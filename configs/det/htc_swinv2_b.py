# HTC++ on SwinV2-B (A2.1): 1536x1536, window 32, lr 4e-4 for 64 images and a tenth of it for the backbone, 3x. Backbone
# from ImageNet-22K at 192x192 with window 12. The paper has no row for B.
#   tools/dist_train.sh configs/det/htc_swinv2_b.py 8
_base_ = [
    '../_base_/models/htc_swinv2.py',
    '../_base_/datasets/coco_semantic_lsj.py',
    '../_base_/schedules/adamw_3x.py',
    '../_base_/default_runtime_det.py',
]

model = dict(
    backbone=dict(
        arch='base',
        window_size=32,
        pretrained_window_sizes=(12, 12, 12, 6),
        drop_path_rate=0.2,  # not stated; that of V1's HTC++
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='swinv2://base_window12_192_22k'),
    ),
    neck=[
        dict(type='swinv2_mm.GlobalAttention', in_channels=1024, num_heads=32, drop_path_rate=0.2),
        dict(type='FPN', in_channels=[128, 256, 512, 1024], out_channels=256, num_outs=5),
    ],
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(
    accumulative_counts=4,  # 8 GPUs x 2 images x 4 = 64
    optimizer=dict(lr=4e-4),
    paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}),
)
auto_scale_lr = dict(base_batch_size=16)  # images of all GPUs before accumulation
