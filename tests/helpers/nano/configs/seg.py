# FCN on a SwinV2 of 16 channels; images and label maps in images/ and labels/.
default_scope = 'mmseg'
data_root = 'data/seg/'
norm = dict(type='BN')
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[128.0] * 3, std=[64.0] * 3, size=(32, 32), pad_val=0, seg_pad_val=255
    ),
    backbone=dict(
        type='swinv2_mm.SwinTransformerV2',
        arch=dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
        window_size=4,
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=16,
        in_index=0,
        channels=8,
        num_convs=1,
        concat_input=False,
        num_classes=2,
        norm_cfg=norm,
        loss_decode=dict(type='CrossEntropyLoss'),
    ),
    test_cfg=dict(mode='whole'),
)
dataset = dict(
    type='BaseSegDataset',
    metainfo=dict(classes=('dark', 'bright'), palette=[(0, 0, 0), (255, 255, 255)]),
    data_root=data_root,
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    img_suffix='.png',
)
load = dict(type='LoadImageFromFile')
labels = dict(type='LoadAnnotations')
pack = dict(type='PackSegInputs')
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(dataset, pipeline=[load, labels, dict(type='RandomFlip', prob=0.5), pack]),
)
val_dataloader = test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(dataset, pipeline=[load, labels, pack]),
)
val_evaluator = test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4, val_interval=4)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    load,
    dict(
        type='TestTimeAug',
        transforms=[[dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)], [labels], [pack]],
    ),
]
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
default_hooks = dict(
    checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', by_epoch=False, interval=2),
    visualization=dict(type='SegVisualizationHook'),
)
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
