# mmseg's UperNet with a Swin V2 backbone. The config that inherits it sets `arch`, `in_channels` of both heads, and the
# crop size in `data_preprocessor`.
_base_ = 'mmseg::_base_/models/upernet_swin.py'

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type='swinv2_mm.SwinTransformerV2', arch='tiny', out_indices=(0, 1, 2, 3)),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=150),
    auxiliary_head=dict(in_channels=384, num_classes=150),
)
