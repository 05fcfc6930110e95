# Cascade Mask R-CNN on SwinV2-S, recipe of cascade_mask_rcnn_swinv2_t.py (A1).
_base_ = './cascade_mask_rcnn_swinv2_t.py'

model = dict(backbone=dict(arch='small', init_cfg=dict(checkpoint='swinv2://small_window8_256')))
