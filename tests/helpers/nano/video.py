"""Video: the recipes at a nano size, a tiny data set in the layout of Kinetics-400, and one for configs/video.py."""

from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config

from nano import ARCH, CHANNELS, shrink_inputs

FACTOR = 8  # 224 pixels become 28, seven patches
LABELS = dict(train=(6, 129), val=(6, 129, 399))  # three videos on two processes


def shrink(cfg: Config) -> Config:
    """The config as one step of training of a nano model on small clips; frames, patches and windows stay."""
    cfg.model.backbone.update(arch=ARCH, init_cfg=None)
    cfg.model.cls_head.in_channels = CHANNELS[-1]
    return shrink_data(cfg)


def shrink_data(cfg: Config) -> Config:
    """The config with small clips, and one step of training."""
    shrink_inputs(cfg, FACTOR)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].batch_size = 2 if split == 'train' else 1
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline  # read by mmaction's inference_recognizer
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    return cfg


def write_video(path: Path, frames: int = 12, size: tuple[int, int] = (64, 48), seed: int = 0) -> Path:
    """Write a video, .avi or .mp4: a bright square moves over a random background.

    decord cannot read videos narrower than 64 pixels.
    """
    generator = np.random.default_rng(seed)
    width, height = size
    background = cv2.resize(generator.integers(0, 200, (4, 6, 3), dtype=np.uint8), size)
    codec = {'.avi': 'MJPG', '.mp4': 'mp4v'}[path.suffix]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 10, size)
    for number in range(frames):
        frame = background.copy()
        x, y = (number * 3) % (width - 8), height // 2
        frame[y : y + 8, x : x + 8] = 255
        writer.write(frame)
    writer.release()
    return path


def write_kinetics400(folder: Path, frames: int = 12) -> Path:
    """Write two videos for training, three for validation, and the lists of their classes.

    Clips of 32 frames, every second one, start at different frames if there are more than 64.
    """
    for split, labels in LABELS.items():
        (folder / f'videos_{split}').mkdir(parents=True)
        lines = []
        for i, label in enumerate(labels):
            write_video(folder / f'videos_{split}' / f'{i}.avi', frames, seed=10 * i + len(labels))
            lines.append(f'{i}.avi {label}\n')
        (folder / f'kinetics400_{split}_list_videos.txt').write_text(''.join(lines))
    return folder


def write_frames(folder: Path) -> Path:
    """Write four clips of three frames and their list with two classes, for configs/video.py."""
    for i in range(4):
        (folder / str(i)).mkdir(parents=True)
        for frame in (1, 2, 3):
            cv2.imwrite(str(folder / f'{i}/img_{frame:05}.jpg'), np.full((32, 32, 3), 60 * i, dtype=np.uint8))
    (folder / 'list.txt').write_text(''.join(f'{i} 3 {i % 2}\n' for i in range(4)))
    return folder
