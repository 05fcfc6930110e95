# Cascade Mask R-CNN of mmdet on a Swin V2. A leaf gives `arch`, and `in_channels` of the neck.
_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'

# Backbone, neck and heads run in bf16; boxes and RoIAlign in fp32.
roi_extractor = dict(type='swinv2_mm.models.detection.Float32RoIExtractor')
model = dict(
    backbone=dict(_delete_=True, type='swinv2_mm.SwinTransformerV2', arch='tiny', out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=[96, 192, 384, 768]),
    rpn_head=dict(type='swinv2_mm.models.detection.Float32RPNHead'),
    roi_head=dict(bbox_roi_extractor=roi_extractor, mask_roi_extractor=roi_extractor),
)
