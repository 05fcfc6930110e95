"""Data for the configs of helpers/tiny: a few pictures with labels, a few clips as frames."""

from pathlib import Path

import cv2
import numpy as np


def write_segments(folder: Path) -> Path:
    """Four images of 32 pixels and their label maps of two classes, for seg.py."""
    generator = np.random.default_rng(0)
    for kind in ('images', 'labels'):
        (folder / kind).mkdir(parents=True)
    for i in range(4):
        label = generator.integers(0, 2, (32, 32), dtype=np.uint8)
        cv2.imwrite(str(folder / f'images/{i}.png'), np.repeat(label[..., None] * 255, 3, axis=2))
        cv2.imwrite(str(folder / f'labels/{i}.png'), label)
    return folder


def write_frames(folder: Path) -> Path:
    """Four clips of three frames and their list with two classes, for video.py."""
    for i in range(4):
        (folder / str(i)).mkdir(parents=True)
        for frame in (1, 2, 3):
            cv2.imwrite(str(folder / f'{i}/img_{frame:05}.jpg'), np.full((32, 32, 3), 60 * i, dtype=np.uint8))
    (folder / 'list.txt').write_text(''.join(f'{i} 3 {i % 2}\n' for i in range(4)))
    return folder
