# UperNet on SwinV2-T, recipe of the ablations (A1): 512x512, window 16, lr 4e-5 for 16 images with a layer-wise decay
# of 0.95, drop path 0.3. Backbone from ImageNet-1K at 256x256 with window 8. Paper: 47.0 mIoU on val (Table 1).
#   tools/dist_train.sh configs/seg/upernet_swinv2_t.py 8
_base_ = [
    '../_base_/models/upernet_swinv2.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/default_runtime_seg.py',
]

model = dict(
    backbone=dict(
        arch='tiny',
        window_size=16,
        pretrained_window_sizes=8,
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='swinv2://tiny_window8_256'),
    ),
)
train_dataloader = dict(batch_size=2)  # 8 GPUs x 2 images = 16
auto_scale_lr = dict(enable=False, base_batch_size=16)
optim_wrapper = dict(
    constructor='swinv2_mm.LearningRateDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.95),
)
