# mmpretrain's ImageClassifier with a Swin V2 backbone and the official head: final norm, average over the tokens, one
# linear layer. The config that inherits it sets `arch`, windows, drop path and the head's `in_channels`. Label
# smoothing, Mixup and CutMix (each for half of the batches) are those of the official config.py.
_base_ = []  # for the import, see add_scope
from swinv2_mm.scope import add_scope

model = dict(
    _scope_='mmpretrain',
    type='ImageClassifier',
    data_preprocessor=dict(
        num_classes=1000,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    backbone=dict(type='swinv2_mm.SwinTransformerV2', arch='tiny', out_indices=(3,)),
    neck=dict(type='swinv2_mm.models.classification.TokenAveragePooling'),
    head=dict(
        type='swinv2_mm.models.classification.SwinV2ClsHead',
        num_classes=1000,
        in_channels=768,
        loss=dict(_scope_='mmpretrain', type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
    train_cfg=dict(
        augments=add_scope('mmpretrain', dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)),
    ),
)
