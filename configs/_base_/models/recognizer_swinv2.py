# mmaction's recognizer of Swin V1 on a Swin V2. A leaf gives `arch`, `in_channels` of the head, windows and patches.
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
