# mmaction's recognizer for Swin V1 with a Swin V2 backbone. The config that inherits it sets `arch`, the head's
# `in_channels`, window and patch size.
_base_ = 'mmaction::_base_/models/swin_tiny.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='swinv2_mm.SwinTransformer3DV2',
        arch='tiny',
        patch_size=(2, 4, 4),
        window_size=(8, 7, 7),
    ),
    cls_head=dict(type='swinv2_mm.models.recognition.Float32I3DHead', in_channels=768, num_classes=400),
)
