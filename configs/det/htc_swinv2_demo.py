_base_ = 'mmdet::htc/htc_r50_fpn_1x_coco.py'

data_root = 'data/shapes_coco/'
classes = ('disc', 'square', 'triangle')
channels = 48
num_rois = 32

bbox_head = [
    dict(head, in_channels=channels, fc_out_channels=128, num_classes=len(classes))
    for head in _base_.model.roi_head.bbox_head
]
mask_head = [
    dict(head, in_channels=channels, conv_out_channels=32, num_convs=2, num_classes=len(classes))
    for head in _base_.model.roi_head.mask_head
]
rcnn = [
    dict(stage, sampler=dict(stage.sampler, num=num_rois), mask_size=20) for stage in _base_.model.train_cfg.rcnn
]
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        _delete_=True,
        type='swinv2_mm.SwinTransformerV2',
        arch=dict(embed_dims=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
        window_size=8,
        drop_path_rate=0.),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=channels),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=bbox_head,
        mask_roi_extractor=dict(out_channels=channels, roi_layer=dict(output_size=10)),
        mask_head=mask_head,
        semantic_roi_extractor=dict(out_channels=channels, roi_layer=dict(output_size=10)),
        semantic_head=dict(in_channels=channels, conv_out_channels=channels, num_convs=2)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=num_rois * 2),
        rcnn=rcnn),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=30)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, with_seg=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
metainfo = dict(classes=classes, palette=[(220, 20, 60), (119, 11, 32), (0, 0, 142)])
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

max_epochs = 8
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(
    _delete_=True,
    _scope_='mmdet',
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.),
    clip_grad=dict(max_norm=5.))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=800),
]
randomness = dict(seed=0)
env_cfg = dict(dist_cfg=dict(backend='gloo'))
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=max_epochs))
