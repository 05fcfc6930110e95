# HTC++ on a nano SwinV2, trained from scratch on the shapes of tools/misc/make_shapes_coco.py. `make demo` runs it on a
# CPU. It has all parts of htc_swinv2_b.py; size and schedule differ.
#   python tools/misc/make_shapes_coco.py data/shapes_coco
#   tools/dist_train.sh configs/det/htc_swinv2_demo.py 2
_base_ = [
    '../_base_/models/htc_swinv2.py',
    '../_base_/datasets/coco_semantic_lsj.py',
    '../_base_/schedules/adamw_3x.py',
    '../_base_/default_runtime_det.py',
]

# Model: few channels, few RoIs, small RoI features. At the recipe's sizes, RoIAlign takes half of a step on a CPU.
classes = ('disc', 'square', 'triangle')
channels = 48
roi_layer = dict(output_size=7, sampling_ratio=1)  # one sample in each of 7x7 bins; masks are 14x14
model = dict(
    data_preprocessor=dict(batch_augments=None),  # all images have the same size
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
        window_size=8,
        drop_path_rate=0.0,
    ),
    neck=[
        dict(type='swinv2_mm.GlobalAttention', in_channels=256, num_heads=8),
        dict(type='FPN', in_channels=[32, 64, 128, 256], out_channels=channels, num_outs=5),
    ],
    rpn_head=dict(
        in_channels=channels, feat_channels=channels, anchor_generator=dict(scales=[4])
    ),  # objects of about 16 to 64 pixels on levels 2 to 4
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, roi_layer=roi_layer),
        bbox_head=[
            dict(head, in_channels=channels, fc_out_channels=128, num_classes=len(classes))
            for head in _base_.model.roi_head.bbox_head
        ],
        mask_roi_extractor=dict(out_channels=channels, roi_layer=roi_layer),
        mask_head=[
            dict(head, num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=len(classes))
            for head in _base_.model.roi_head.mask_head
        ],
        semantic_roi_extractor=dict(out_channels=channels, roi_layer=roi_layer),
        semantic_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=64),
        rcnn=[dict(stage, sampler=dict(stage.sampler, num=32), mask_size=14) for stage in _base_.model.train_cfg.rcnn],
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=64), rcnn=dict(max_per_img=20)),
)

# Data: 128x128 pixels, flips only.
data_root = 'data/shapes_coco/'
metainfo = dict(classes=classes, palette=[(220, 20, 60), (255, 215, 0), (0, 90, 220)])
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, with_seg=True),
    dict(type='Resize', scale=(128, 128)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128)),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,  # training takes all cores of a small machine
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

# Schedule: 500 steps of 8 images. Training from scratch takes a much larger learning rate than fine-tuning, for all
# parts.
max_epochs = 5
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=2e-3, betas=(0.9, 0.98)), clip_grad=dict(max_norm=5))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', begin=0, end=max_epochs, eta_min=1e-5, by_epoch=True, convert_to_iter_based=True),
]
randomness = dict(seed=0)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=max_epochs), visualization=dict(score_thr=0.5))
# masks in the colours of their classes; thin lines, because the images are small
visualizer = dict(type='swinv2_mm.engine.det_visualization.ClassColorVisualizer', line_width=2, alpha=0.7)
