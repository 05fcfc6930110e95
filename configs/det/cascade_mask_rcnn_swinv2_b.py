# Cascade Mask R-CNN on SwinV2-B, recipe of cascade_mask_rcnn_swinv2_t.py (A1).
_base_ = './cascade_mask_rcnn_swinv2_t.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.3,  # not stated; that of V1
        init_cfg=dict(checkpoint='swinv2://base_window8_256'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
