# A classifier on a SwinV2 of 16 channels; images in train/ and val/, one folder for each class.
default_scope = 'mmpretrain'
data_root = 'data/cls/'
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='swinv2_mm.SwinTransformerV2',
        arch=dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
        window_size=4,
        drop_path_rate=0.1,
        out_indices=(3,),
    ),
    neck=dict(type='swinv2_mm.models.classification.TokenAveragePooling'),
    head=dict(
        type='swinv2_mm.models.classification.SwinV2ClsHead',
        num_classes=2,
        in_channels=128,
        loss=dict(type='CrossEntropyLoss'),
    ),
)
data_preprocessor = dict(type='ClsDataPreprocessor', mean=[128.0] * 3, std=[64.0] * 3, num_classes=2, to_rgb=True)
load = dict(type='LoadImageFromFile')
pack = dict(type='PackInputs')
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset',
        data_root=data_root,
        data_prefix='train',
        pipeline=[load, dict(type='RandomResizedCrop', scale=32), dict(type='RandomFlip', prob=0.5), pack],
    ),
)
val_dataloader = test_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset',
        data_root=data_root,
        data_prefix='val',
        pipeline=[load, dict(type='ResizeEdge', scale=40), dict(type='CenterCrop', crop_size=32), pack],
    ),
)
val_evaluator = test_evaluator = dict(type='Accuracy')
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', interval=1),
    visualization=dict(type='VisualizationHook'),
)
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
