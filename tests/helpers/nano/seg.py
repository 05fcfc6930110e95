"""Segmentation: the recipes at a nano size, a tiny data set in the layout of ADE20K, and one for configs/seg.py."""

from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config

from nano import ARCH, CHANNELS, shrink_inputs

FACTOR = 8  # 512 pixels become 64


def shrink(cfg: Config) -> Config:
    """The config as one step of training of a nano model on small images."""
    cfg.model.backbone.update(arch=ARCH, init_cfg=None)
    cfg.model.decode_head.update(in_channels=CHANNELS, channels=16)
    cfg.model.auxiliary_head.update(in_channels=CHANNELS[2], channels=16)
    return shrink_data(cfg)


def shrink_data(cfg: Config) -> Config:
    """The config with small images, and one step of training."""
    shrink_inputs(cfg, FACTOR)
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg.update(max_iters=1, val_interval=1)
    return cfg


def write_ade20k(folder: Path) -> Path:
    """Write two images for training and two for validation, with labels of 0 to 150 in blocks."""
    generator = np.random.default_rng(0)
    for split in ('training', 'validation'):
        for kind in ('images', 'annotations'):
            (folder / kind / split).mkdir(parents=True)
        for i in range(2):
            labels = generator.integers(0, 151, (6, 8), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
            image = np.stack([labels, 255 - labels, labels // 2], -1)
            cv2.imwrite(str(folder / f'images/{split}/{i}.jpg'), image)
            cv2.imwrite(str(folder / f'annotations/{split}/{i}.png'), labels)
    return folder


def write_segments(folder: Path) -> Path:
    """Write four images of 32 pixels and their label maps of two classes, for configs/seg.py."""
    generator = np.random.default_rng(0)
    for kind in ('images', 'labels'):
        (folder / kind).mkdir(parents=True)
    for i in range(4):
        label = generator.integers(0, 2, (32, 32), dtype=np.uint8)
        cv2.imwrite(str(folder / f'images/{i}.png'), np.repeat(label[..., None] * 255, 3, axis=2))
        cv2.imwrite(str(folder / f'labels/{i}.png'), label)
    return folder
