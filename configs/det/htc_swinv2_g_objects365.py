# HTC++ without its mask branch on SwinV2-G, trained on Objects365 v2 before COCO (A2.2): window 32, lr 1.2e-3 for 96
# images, 67,500 steps. What the paper writes as "[800, 1024]" is taken as the range of the shorter side; the longer one
# is not stated: 1600 is that of Swin V1's HTC++. Not stated either: InstaBoost, which would need masks, and all that is
# kept from htc_swinv2_g.py. There are no semantic maps, and so no semantic branch.
#   tools/dist_train.sh configs/det/htc_swinv2_g_objects365.py 8
# The training on COCO starts from its last checkpoint, see htc_swinv2_g.py. Mask branch, semantic branch and the
# classifiers, of 80 classes for 365, are then fresh; the rest is loaded.
_base_ = './htc_swinv2_g.py'

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
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=[(1600, 800), (1600, 1024)], keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='Resize', scale=(1600, 1024), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
# as mmengine would stamp another scope on a pipeline that is taken from `_base_ = 'swinv2_mm::...'`
train_pipeline = [dict(t, _scope_='mmdet') for t in train_pipeline]
test_pipeline = [dict(t, _scope_='mmdet') for t in test_pipeline]
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
warmup, decay = _base_.param_scheduler
param_scheduler = [warmup, dict(decay, end=steps, milestones=[steps * 27 // 36, steps * 33 // 36])]
optim_wrapper = dict(optimizer=dict(lr=1.2e-3))
default_hooks = dict(checkpoint=dict(interval=steps // 10))
