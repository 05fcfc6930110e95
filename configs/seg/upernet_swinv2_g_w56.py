# UperNet on SwinV2-G, tested at 896 (shorter side) with window 56, from a checkpoint of upernet_swinv2_g.py, which was
# trained at 640 with window 40. Paper: 59.3 mIoU on val, and 59.9 at several scales (Table 4), here --tta.
#   tools/dist_test.sh configs/seg/upernet_swinv2_g_w56.py CHECKPOINT 8
_base_ = './upernet_swinv2_g.py'
from swinv2_mm.scope import add_scope

model = dict(backbone=dict(window_size=56))
test_pipeline = add_scope(
    'mmseg',
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(3584, 896), keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='swinv2_mm.datasets.labels.CheckLabels', num_classes=150),
    dict(type='PackSegInputs'),
)
tta_pipeline = add_scope(
    'mmseg',
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(int(r * 3584), int(r * 896)), keep_ratio=True) for r in _base_.ratios],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations', reduce_zero_label=True)],
            [dict(type='swinv2_mm.datasets.labels.CheckLabels', num_classes=150)],
            [dict(type='PackSegInputs')],
        ],
    ),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
