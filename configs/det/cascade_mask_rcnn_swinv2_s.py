# Cascade Mask R-CNN on SwinV2-S, as cascade_mask_rcnn_swinv2_t.py (A1).
_base_ = './cascade_mask_rcnn_swinv2_t.py'

model = dict(backbone=dict(arch='small'))
