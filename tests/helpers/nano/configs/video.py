# TSN with mmaction's own MobileNetV2 on folders of frames, listed in list.txt.
default_scope = 'mmaction'
data_root = 'data/video/'
model = dict(
    type='Recognizer2D',
    backbone=dict(type='MobileNetV2', widen_factor=0.25),
    cls_head=dict(type='TSNHead', num_classes=2, in_channels=1280, average_clips='prob'),
    data_preprocessor=dict(type='ActionDataPreprocessor', mean=[128.0] * 3, std=[64.0] * 3, format_shape='NCHW'),
)
pipeline = [
    dict(type='SampleFrames', clip_len=1, frame_interval=1, num_clips=2),
    dict(type='RawFrameDecode'),
    dict(type='FormatShape', input_format='NCHW'),
    dict(type='PackActionInputs'),
]
loader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='RawframeDataset', ann_file=data_root + 'list.txt', data_prefix=dict(img=data_root), pipeline=pipeline
    ),
)
train_dataloader = val_dataloader = test_dataloader = loader
val_evaluator = test_evaluator = dict(type='AccMetric')
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01))
default_hooks = dict(
    checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', interval=1), visualization=dict(type='VisualizationHook')
)
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='ActionVisualizer', vis_backends=vis_backends)
