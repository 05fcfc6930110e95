# SimMIM pre-training of SwinV2-B on the images of ImageNet-1K, with the official settings
# (simmim_pretrain__swinv2_base__img192_window12__800ep.yaml): 192x192, window 12, lr 4e-4 for 2048 images, 800 epochs,
# of which 10 are warm-up, weight decay 0.05, gradients clipped at 5, drop path 0.1.
#   tools/dist_train.sh configs/ssl/simmim_swinv2_b_in1k_192.py 8
_base_ = [
    '../_base_/models/simmim_swinv2.py',
    '../_base_/datasets/imagenet_simmim_192.py',
    '../_base_/schedules/adamw_800e.py',
    '../_base_/default_runtime_cls.py',
]

train_dataloader = dict(batch_size=256)  # 8 GPUs x 256 images = 2048
default_hooks = dict(checkpoint=dict(interval=10))
