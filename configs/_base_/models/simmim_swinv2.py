# mmpretrain's SimMIM with a Swin V2 backbone, window 12 for images of 192 pixels, and the mean absolute error of masked
# pixels as loss. The config that inherits it sets `arch` and the neck's `in_channels`.
model = dict(
    _scope_='mmpretrain',
    type='SimMIM',
    data_preprocessor=dict(
        type='SelfSupDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    backbone=dict(
        type='swinv2_mm.SimMIMSwinTransformerV2',
        arch='base',
        window_size=(12, 12, 12, 6),  # the last stage has 6x6 tokens
        drop_path_rate=0.1,
    ),
    neck=dict(type='SimMIMLinearDecoder', in_channels=1024, encoder_stride=32),
    head=dict(
        type='SimMIMHead',
        patch_size=4,  # of the backbone: the mask has one entry per patch
        loss=dict(_scope_='mmpretrain', type='PixelReconstructionLoss', criterion='L1', channel=3),
    ),
)
