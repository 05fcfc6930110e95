"""Makes short clips whose class is visible only in the motion: a shape moves along a row, by a step for each class.

    python tools/misc/make_motion_clips.py data/motion_clips --train 3000 --val 400

From frame to frame the shape moves to the right by 1, 3, 5 or 7 eighths of the frame's width (classes 0 to 3). It wraps
around at the edge, so that 7 eighths look like 1 to the left. In the eight frames of a clip it visits each of the same
eight places once, whatever the step, and everything else is random and independent of the class. So the class depends
only on the order of the frames, not on a single frame nor on the set of frames.

The clips are in OUT/train and OUT/val. OUT/val_shuffled has the clips of OUT/val with their frames in a random order,
OUT/val_frozen has one random frame of each, eight times: no model can do better than chance on these. OUT/<name>.txt
lists the files and classes of each folder, as mmaction's VideoDataset reads them. The same arguments give the same
bytes.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from make_shapes_coco import is_new_or_marked, pixel_centres, random_shape, whole_or_nothing

FRAMES = 8  # and as many places in the row
STEPS = (1, 3, 5, 7)  # of each class, in eighths of the width; coprime to 8, so that all places are visited
SIZE_STEP = 32  # decord fails on frames of some other widths, such as 48 and 72
RADIUS = (0.09, 0.13)  # of the shape, as a fraction of the side of the frame
FRAMES_PER_SECOND = 8
MARK = 'made_by_make_motion_clips.txt'


def paint_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A dark, almost grey brightness gradient in a random direction. Returns float BGR."""
    x, y = pixel_centres(size)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(angle) * (x - size / 2) + np.sin(angle) * (y - size / 2)) / size
    brightness = rng.uniform(60, 110) + rng.uniform(0, 50) * slope
    return brightness[..., None] + rng.uniform(-12, 12, 3)


def draw_places(rng: np.random.Generator, size: int) -> np.ndarray:
    """Images of a random shape in each of its places, as (8, size, size, 3) uint8; independent of the class."""
    background = paint_background(rng, size)
    shape = random_shape(rng, size)
    radius = rng.uniform(*RADIUS) * size
    colour = (np.array(shape.colour) + 255) / 2  # halfway to white, lighter than any background
    row = rng.uniform(radius, size - radius)
    pictures = []
    for x in (rng.random() + np.arange(FRAMES) / FRAMES) % 1 * size:
        picture = background + rng.normal(0, 4, (size, size, 1))
        for column in (x - size, x, x + size):  # wraps around at the edges
            mask = replace(shape, centre=(column, row), radius=radius).covers(*pixel_centres(size))
            picture[mask] = colour
        pictures.append(np.clip(np.rint(picture), 0, 255).astype(np.uint8))
    return np.stack(pictures)


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Writes frames of (height, width, 3), BGR, as Motion JPEG; raises OSError if OpenCV cannot write the file.

    Motion JPEG encodes each frame independently. Artefacts of a codec with motion prediction would depend on the order.
    """
    height, width = frames.shape[1:3]
    codec = cv2.VideoWriter_fourcc(*'MJPG')
    # OpenCV's own encoder: its bytes do not depend on a version of ffmpeg.
    writer = cv2.VideoWriter(str(path), cv2.CAP_OPENCV_MJPEG, codec, FRAMES_PER_SECOND, (width, height))
    if not writer.isOpened():
        raise OSError(f'cannot write {path}')
    for frame in frames:
        writer.write(frame)
    writer.release()


def write_list(root: Path, folder: str, count: int) -> None:
    """Writes the list of clips and classes of a folder; classes alternate."""
    lines = [f'{index:06d}.avi {index % len(STEPS)}\n' for index in range(count)]
    (root / f'{folder}.txt').write_text(''.join(lines))


def write_split(root: Path, split: str, count: int, size: int, seeds: tuple[int, int], controls: bool) -> None:
    """Writes one split, and its shuffled and frozen clips if `controls` is set. Each clip has its own seed."""
    folders = [split, f'{split}_shuffled', f'{split}_frozen'] if controls else [split]
    for folder in folders:
        (root / folder).mkdir(parents=True)
        write_list(root, folder, count)
    for index in range(count):
        rng = np.random.default_rng((*seeds, index))
        places = draw_places(rng, size)
        step = STEPS[index % len(STEPS)]
        orders = [step * np.arange(FRAMES) % FRAMES, rng.permutation(FRAMES), np.full(FRAMES, rng.integers(FRAMES))]
        for folder, order in zip(folders, orders, strict=False):
            write_clip(root / folder / f'{index:06d}.avi', places[order])
        if (index + 1) % 500 == 0 or index + 1 == count:
            print(f'{split}: {index + 1} of {count} clips', flush=True)


def make_dataset(out: Path, train: int, val: int, size: int, seed: int) -> None:
    """Writes the data set."""
    with whole_or_nothing(out) as root:
        write_split(root, 'train', train, size, (seed, 0), controls=False)
        write_split(root, 'val', val, size, (seed, 1), controls=True)
        (root / MARK).write_text(f'--train {train} --val {val} --size {size} --seed {seed}\n')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='folder to make')
    parser.add_argument('--train', type=int, default=3000, help='number of training clips (default: %(default)s)')
    parser.add_argument('--val', type=int, default=400, help='number of validation clips (default: %(default)s)')
    parser.add_argument('--size', type=int, default=64, help='side of a frame in pixels (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='another seed gives other clips (default: %(default)s)')
    args = parser.parse_args(argv)
    for name, least in (('train', len(STEPS)), ('val', len(STEPS)), ('size', SIZE_STEP), ('seed', 0)):
        if getattr(args, name) < least:
            parser.error(f'--{name} is {getattr(args, name)}, give at least {least}')
    if args.size % SIZE_STEP:
        parser.error(f'--size is {args.size}, give a multiple of {SIZE_STEP}: decord fails on some others')
    if not is_new_or_marked(args.out, MARK):
        parser.error(f'{args.out} exists and is not a data set of this tool: delete it or choose another folder')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the data set that the command line asks for."""
    args = parse_args(argv)
    make_dataset(args.out, args.train, args.val, args.size, args.seed)
    steps = ', '.join(f'{step}/{FRAMES}' for step in STEPS)
    print(f'{args.out}: clips of {FRAMES} frames of {args.size} x {args.size} pixels; steps of {steps} of the width')


if __name__ == '__main__':
    sys.exit(main())
