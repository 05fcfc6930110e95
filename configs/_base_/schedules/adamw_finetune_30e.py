# Fine-tuning on ImageNet-1K: as adamw_300e.py, but 30 epochs with lr 4e-5 and weight decay 1e-8 (A2.1), 5 of them
# warm-up (official configs).
_base_ = './adamw_300e.py'
from swinv2_mm.scope import add_scope

train_cfg = dict(max_epochs=30)
param_scheduler = add_scope(
    'mmpretrain',
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, begin=5, end=30, convert_to_iter_based=True),
)
optim_wrapper = dict(optimizer=dict(lr=4e-5, weight_decay=1e-8))
