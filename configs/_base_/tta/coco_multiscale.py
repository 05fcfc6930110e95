# Test at several scales with flips, for `tools/test.py --tta`. The paper has such a test, with window 48 (Table 3), but
# states neither the scales nor the merging. These are of ViT-Adapter's HTC++: six shorter sides, each of which gives
# boxes of the sizes that it is good at (COCO's small, medium and large, in pixels of the original image), and soft-NMS.
views = {
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
tta_pipeline = [
    dict(_scope_='mmdet', type='LoadImageFromFile', backend_args=None),
    dict(
        _scope_='mmdet',
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(3000, side), keep_ratio=True) for side in views],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='PackDetInputs', meta_keys=meta_keys)],
        ],
    ),
]
