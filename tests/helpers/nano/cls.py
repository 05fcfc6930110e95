"""Classification: a tiny data set with a folder for each class, for configs/cls.py."""

from pathlib import Path

import cv2
import numpy as np

CLASSES = ('dark', 'bright')


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
