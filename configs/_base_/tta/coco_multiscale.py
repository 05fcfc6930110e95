# Multi-scale test with flips, for `tools/test.py --tta`. The paper has such a test with window 48 (Table 3), but states
# neither the scales nor how predictions are merged. Both follow ViT-Adapter's HTC++: six shorter sides; each keeps only
# the boxes within its size range (COCO's small, medium and large, in pixels of the original image); then soft-NMS.
_base_ = []  # for the import, see add_scope
from swinv2_mm.scope import add_scope

views = {  # shorter side: smallest and largest box
    600: (96, 1e5),
    800: (96, 1e5),
    1000: (32, 1e5),
    1200: (0, 96),
    1400: (0, 96),
    1600: (0, 96),
}
meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
tta_model = dict(
    type='swinv2_mm.models.det_tta.InstanceSegTTAModel',
    tta_cfg=dict(nms=dict(type='soft_nms', iou_threshold=0.5), max_per_img=100),
    size_limits=list(views.values()),
)
tta_pipeline = add_scope(
    'mmdet',
    dict(type='LoadImageFromFile', backend_args=None),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(3000, side), keep_ratio=True) for side in views],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='PackDetInputs', meta_keys=meta_keys)],
        ],
    ),
)
