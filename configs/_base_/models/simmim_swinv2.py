# mmpretrain's SimMIM with a Swin V2 backbone and the official settings for Swin V2: window 12 for images of 192 pixels,
# drop path 0.1, and the mean absolute error of masked pixels, which are normalized in squares of 47 pixels. The config
# that inherits it sets `arch` and the neck's `in_channels`.
model = dict(
    _scope_='mmpretrain',
    type='SimMIM',
    data_preprocessor=dict(
        type='ImgDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(
        type='swinv2_mm.SimMIMSwinTransformerV2',
        arch='base',
        window_size=(12, 12, 12, 6),  # the last stage has 6x6 tokens
        drop_path_rate=0.1,
    ),
    neck=dict(type='SimMIMLinearDecoder', in_channels=1024, encoder_stride=32),
    head=dict(
        type='swinv2_mm.models.pretraining.NormalizedSimMIMHead',
        patch_size=4,
        norm_window=47,
        loss=dict(_scope_='mmpretrain', type='PixelReconstructionLoss', criterion='L1', channel=3),
    ),
)
