"""Self-supervised pre-training: the recipes at a nano size, and a folder of images."""

from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config

from nano import ARCH, CHANNELS

SIZE = 96  # of 192 pixels


def shrink(cfg: Config, arch: dict = ARCH) -> Config:
    """The config as one step of training of a nano model on small images; windows stay."""
    cfg.model.backbone.arch = arch
    cfg.model.neck.in_channels = CHANNELS[-1]
    loader = cfg.train_dataloader
    loader.update(batch_size=2, num_workers=0)
    for transform in loader.dataset.pipeline:
        transform.update({key: SIZE for key in ('scale', 'input_size') if key in transform})
    cfg.train_cfg.update({key: 1 for key in ('max_iters', 'max_epochs') if key in cfg.train_cfg})
    cfg.optim_wrapper.pop('accumulative_counts', None)
    cfg.default_hooks.logger.interval = cfg.default_hooks.checkpoint.interval = 1
    return cfg


def write_images(folder: Path) -> Path:
    """Write two images in two folders below train/, as in ImageNet-1K, which is also images/, as in ImageNet-22K."""
    generator = np.random.default_rng(0)
    for i in range(2):
        (folder / f'train/{i}').mkdir(parents=True)
        image = cv2.resize(generator.integers(0, 256, (4, 6, 3), dtype=np.uint8), (120, 100))
        cv2.imwrite(str(folder / f'train/{i}/{i}.jpg'), image)
    (folder / 'images').symlink_to('train')
    return folder
