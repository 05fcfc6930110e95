# Images without labels for SimMIM, all below a folder: here those of ImageNet-1K. As in the official code
# (data_simmim_pt.py), random crops of 67 to 100 % of the image, flips, and masks of 32x32 pixels over 60 % of it.
_base_ = []  # for the import, see add_scope
from swinv2_mm.scope import add_scope

data_root = 'data/imagenet/'

train_pipeline = add_scope(
    'mmpretrain',
    # Pillow's pixels, and its disregard of EXIF orientation
    dict(type='LoadImageFromFile', imdecode_backend='pillow', color_type='color_ignore_orientation'),
    dict(
        type='RandomResizedCrop',
        scale=192,
        crop_ratio_range=(0.67, 1.0),
        aspect_ratio_range=(3 / 4, 4 / 3),
        interpolation='bilinear',
        backend='pillow',
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='SimMIMMaskGenerator', input_size=192, mask_patch_size=32, model_patch_size=4, mask_ratio=0.6),
    dict(type='PackInputs'),
)
train_dataloader = dict(
    batch_size=256,
    num_workers=8,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        _scope_='mmpretrain',
        type='CustomDataset',
        data_root=data_root,
        data_prefix='train',
        with_label=False,
        pipeline=train_pipeline,
    ),
)
