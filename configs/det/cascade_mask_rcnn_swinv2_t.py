# Cascade Mask R-CNN on SwinV2-T, recipe of the ablations (A1): window 16, lr 1e-4 for 16 images, 3x. Backbone from
# ImageNet-1K at 256x256 with window 8. Paper: 51.1 box AP on val (Table 1).
#   tools/dist_train.sh configs/det/cascade_mask_rcnn_swinv2_t.py 8
_base_ = [
    '../_base_/models/cascade_mask_rcnn_swinv2.py',
    '../_base_/datasets/coco_multiscale.py',
    '../_base_/schedules/adamw_3x.py',
    '../_base_/default_runtime_det.py',
]

# Not stated; the head of Swin V1's detection configs.
bbox_head = [
    dict(
        type='ConvFCBBoxHead',
        num_shared_convs=4,
        num_shared_fcs=1,
        in_channels=256,
        conv_out_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=80,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[x, x, 2 * x, 2 * x]),
        reg_class_agnostic=True,
        reg_decoded_bbox=True,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
    )
    for x in (0.1, 0.05, 0.033)
]
model = dict(
    backbone=dict(
        arch='tiny',
        window_size=16,
        pretrained_window_sizes=8,
        drop_path_rate=0.2,  # not stated; that of V1
        init_cfg=dict(type='Pretrained', checkpoint='swinv2://tiny_window8_256'),
    ),
    roi_head=dict(bbox_head=bbox_head),
)
