# Mask2Former for instance segmentation on SwinV2-L, which mmdet lacks for Swin V1. 200 queries and 100 epochs are those
# of the Mask2Former paper for Swin-L (arXiv:2112.01527), with the schedule of mmdet's panoptic config; the rest is that
# of mask2former_swinv2_t.py. No published result. Backbone from ImageNet-22K at 192x192 with window 12.
#   tools/dist_train.sh configs/det/mask2former_swinv2_l.py 8 --cfg-options train_dataloader.batch_size=2
# A step takes 16 images, here on 8 GPUs. Without the option the config is one for 16 GPUs.
_base_ = './mask2former_swinv2_t.py'

model = dict(
    backbone=dict(
        arch='large',
        pretrained_window_sizes=(12, 12, 12, 6),
        init_cfg=dict(checkpoint='swinv2://large_window12_192_22k'),
    ),
    panoptic_head=dict(num_queries=200, in_channels=[192, 384, 768, 1536]),
)
train_dataloader = dict(batch_size=1, num_workers=1)
max_iters = 737_500
train_cfg = dict(max_iters=max_iters, dynamic_intervals=[(735_001, max_iters)])  # the last validation is at the end
param_scheduler = dict(end=max_iters, milestones=[655_556, 710_184])
