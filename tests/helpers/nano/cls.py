"""Classification: the recipes at a nano size, tiny data in the layouts of ImageNet, and data for configs/cls.py."""

from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config

from nano import ARCH, CHANNELS, shrink_inputs

FACTOR = 8  # 256 pixels become 32
LABELS = (6, 999)
CLASSES = ('dark', 'bright')


def shrink(cfg: Config) -> Config:
    """The config as one step of training of a nano model on small images; the number of classes stays."""
    cfg.model.backbone.update(arch=ARCH, init_cfg=None)
    cfg.model.head.in_channels = CHANNELS[-1]
    return shrink_data(cfg)


def shrink_data(cfg: Config) -> Config:
    """The config with small images, and one step of training."""
    shrink_inputs(cfg, FACTOR)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].batch_size = 2
    cfg.train_cfg.update({'max_iters' if 'max_iters' in cfg.train_cfg else 'max_epochs': 1, 'val_interval': 1})
    cfg.optim_wrapper.accumulative_counts = 1
    return cfg


def write_imagenet(folder: Path) -> Path:
    """Write two images with lists for training and validation of ImageNet-1K and -22K, and `v2` of ImageNet-V2."""
    generator = np.random.default_rng(0)
    for name in ('images', 'meta', *(f'v2/{i}' for i in range(1000))):
        (folder / name).mkdir(parents=True)
    for label in LABELS:
        image = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        cv2.imwrite(str(folder / f'images/{label}.jpg'), image)
        cv2.imwrite(str(folder / f'v2/{label}/a.jpeg'), image)
    for split in ('train', 'val'):
        (folder / split).symlink_to('images')
        (folder / f'meta/{split}.txt').write_text(''.join(f'{label}.jpg {label}\n' for label in LABELS))
    return folder


def write_classes(folder: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """Write three images for training and two for validation of each class, `SPLIT/CLASS/NUMBER.png`.

    The brightness of the images is that of their class.
    """
    generator = np.random.default_rng(0)
    for split, count in (('train', 3), ('val', 2)):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = generator.integers(0, 64, (40, 48, 3)) + number * 192 // max(1, len(classes) - 1)
                cv2.imwrite(str(folder / f'{split}/{name}/{name}_{i}.png'), image.astype(np.uint8))
    return folder
