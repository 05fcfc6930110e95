# HTC++ without its mask branch on SwinV2-G, on Objects365 v2 before COCO (A2.2): window 32, lr 1.2e-3 for 96 images,
# 67,500 steps.
#   tools/dist_train.sh configs/det/htc_swinv2_g_objects365.py 8
# The paper's input "[800, 1024]" is read as the range of the shorter side. The longer side is not stated; 1600 is that
# of Swin V1's HTC++. No InstaBoost, which needs masks (not stated), and no semantic branch, because Objects365 has no
# semantic segmentation maps. What else is not stated is as in htc_swinv2_g.py. The training on COCO, htc_swinv2_g.py,
# loads the last checkpoint except for the mask branch, the semantic branch and the classifiers (80 classes instead of
# 365), which are initialized at random.
_base_ = './htc_swinv2_g.py'
from swinv2_mm.scope import add_scope

# Model
model = dict(
    data_preprocessor=dict(pad_mask=False, pad_seg=False, batch_augments=None),
    roi_head=dict(
        bbox_head=[dict(head, num_classes=365) for head in _base_.model.roi_head.bbox_head],
        mask_roi_extractor=None,
        mask_head=None,
        semantic_roi_extractor=None,
        semantic_head=None,
    ),
)

# Data
data_root = 'data/Objects365/Obj365_v2/'
train_pipeline = add_scope(
    'mmdet',
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=[(1600, 800), (1600, 1024)], keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
)
test_pipeline = add_scope(
    'mmdet',
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='Resize', scale=(1600, 1024), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
)
train_dataloader = dict(
    dataset=dict(
        type='Objects365V2Dataset',
        data_root=data_root,
        ann_file='annotations/zhiyuan_objv2_train.json',
        data_prefix=dict(_delete_=True, img='train/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        type='Objects365V2Dataset',
        data_root=data_root,
        ann_file='annotations/zhiyuan_objv2_val.json',
        data_prefix=dict(img='val/'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/zhiyuan_objv2_val.json', metric='bbox')
test_evaluator = val_evaluator

# Schedule
steps = 67_500 * _base_.accumulate
train_cfg = dict(max_iters=steps, val_interval=steps // 10)
param_scheduler = add_scope(
    'mmdet',
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000 * _base_.accumulate),
    dict(
        type='MultiStepLR',
        begin=0,
        end=steps,
        by_epoch=False,
        milestones=[steps * 27 // 36, steps * 33 // 36],  # epochs 27 and 33 of 36
        gamma=0.1,
    ),
)
optim_wrapper = dict(optimizer=dict(lr=1.2e-3))
default_hooks = dict(checkpoint=dict(interval=steps // 10))
