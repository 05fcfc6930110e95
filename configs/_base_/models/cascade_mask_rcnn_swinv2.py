# mmdet's Cascade Mask R-CNN with a Swin V2 backbone. The config that inherits it sets `arch` and the neck's
# `in_channels`.
_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'

# Backbone, neck and heads run in bf16; boxes and RoIAlign stay in fp32, because mmdet and mmcv lack bf16 there.
roi_extractor = dict(type='swinv2_mm.models.detection.Float32RoIExtractor')
model = dict(
    backbone=dict(_delete_=True, type='swinv2_mm.SwinTransformerV2', arch='tiny', out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=[96, 192, 384, 768]),
    rpn_head=dict(type='swinv2_mm.models.detection.Float32RPNHead'),
    roi_head=dict(bbox_roi_extractor=roi_extractor, mask_roi_extractor=roi_extractor),
)
