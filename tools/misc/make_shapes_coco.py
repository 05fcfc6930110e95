"""Makes a small COCO-format data set: discs, squares and triangles before sky, grass, sand and sea.

    python tools/misc/make_shapes_coco.py data/shapes_coco --train 800 --val 100

Images, instance annotations and stuff maps have the folders of COCO and COCO-Stuff, so that any COCO config of mmdet
can read them, also HTC with its semantic branch. For mmsegmentation, `labels` has the same maps with labels from 0, in
the order above. The same arguments give the same bytes.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_utils

DESCRIPTION = 'Shapes before stuff, made by make_shapes_coco.py'
THINGS = ('disc', 'square', 'triangle')
# label values of COCO-Stuff (its category ids minus one), so that a head for its classes needs no change
STUFF = {'grass': 123, 'sand': 153, 'sea': 154, 'sky-other': 156}
LABELS = (*range(len(THINGS)), *STUFF.values())  # of stuff maps; their indices here are the labels for mmsegmentation
MIN_SIZE = 32  # mmdet's COCO configs filter out smaller training images
OBJECTS_PER_IMAGE = (2, 4)
RADIUS = (0.10, 0.22)  # as a fraction of the image side
MIN_VISIBLE = 0.6  # fraction of each object's area; with less, the rest of a square could look like that of a disc


@dataclass(frozen=True)
class Shape:
    """One object. The radius is that of the circumscribed circle, the angle is in radians.

    Coordinates are as in COCO: the pixel in row 0 and column 0 covers [0, 1) x [0, 1), its centre is (0.5, 0.5).
    """

    kind: str
    centre: tuple[float, float]
    radius: float
    angle: float
    colour: tuple[float, float, float]

    def corners(self) -> np.ndarray:
        """Corners of a square or triangle as an array of (x, y), sorted by angle."""
        count = {'triangle': 3, 'square': 4}[self.kind]
        angles = self.angle + 2 * np.pi * np.arange(count) / count
        return np.stack([np.cos(angles), np.sin(angles)], axis=1) * self.radius + self.centre

    def covers(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Whether the points lie inside the shape, all edges included."""
        if self.kind == 'disc':
            return (x - self.centre[0]) ** 2 + (y - self.centre[1]) ** 2 <= self.radius**2
        corners = self.corners()
        inside = np.ones(np.broadcast(x, y).shape, dtype=bool)
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            inside &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
        return inside


@dataclass(frozen=True)
class Scene:
    """One image with its ground truth."""

    shapes: list[Shape]  # from back to front
    image: np.ndarray  # (size, size, 3) uint8, BGR
    instances: np.ndarray  # (size, size) 0 for stuff, i + 1 where shapes[i] is visible
    semantic: np.ndarray  # (size, size) uint8, thing classes from 0 and the values of STUFF


def pixel_centres(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The x of every column as (1, size) and the y of every row as (size, 1)."""
    centres = np.arange(size) + 0.5
    return centres[None, :], centres[:, None]


def random_shape(rng: np.random.Generator, size: int) -> Shape:
    """A shape that is entirely inside the image. Its colour is independent of its class."""
    kind = THINGS[rng.integers(len(THINGS))]
    radius = rng.uniform(*RADIUS) * size
    centre = tuple(rng.uniform(radius, size - radius, 2).tolist())
    hue, saturation, value = rng.uniform((0, 0.65, 0.75), (360, 1, 1))
    colour = cv2.cvtColor(np.array([[[hue, saturation, value]]], np.float32), cv2.COLOR_HSV2BGR)[0, 0]
    return Shape(kind, centre, radius, rng.uniform(0, 2 * np.pi), tuple((255 * colour).tolist()))


def place_shapes(rng: np.random.Generator, size: int) -> tuple[list[Shape], np.ndarray]:
    """Places shapes, later ones in front, such that `MIN_VISIBLE` of each is visible; returns shapes and instances."""
    x, y = pixel_centres(size)
    shapes: list[Shape] = []
    areas: list[int] = []
    instances = np.zeros((size, size), np.int32)
    wanted = rng.integers(OBJECTS_PER_IMAGE[0], OBJECTS_PER_IMAGE[1] + 1)
    while len(shapes) < wanted:
        shape = random_shape(rng, size)
        mask = shape.covers(x, y)
        candidate = np.where(mask, len(shapes) + 1, instances)
        visible = np.bincount(candidate.ravel(), minlength=len(shapes) + 2)[1:-1]
        if np.all(visible >= MIN_VISIBLE * np.array(areas)):
            shapes.append(shape)
            areas.append(int(mask.sum()))
            instances = candidate
    return shapes, instances


def stuff_map(rng: np.random.Generator, size: int) -> np.ndarray:
    """Sky above a wavy horizon, two kinds of ground below it side by side."""
    x, y = pixel_centres(size)
    height, slope, wave = rng.uniform((0.35, -0.15, 0.0), (0.65, 0.15, 0.03))
    horizon = size * (height + wave * np.sin(2 * np.pi * (2 * x / size + rng.random()))) + slope * (x - size / 2)
    border = size * rng.uniform(0.2, 0.8) + rng.uniform(-0.5, 0.5) * (y - size / 2)
    left, right = rng.choice([STUFF['grass'], STUFF['sand'], STUFF['sea']], 2, replace=False)
    return np.where(y < horizon, STUFF['sky-other'], np.where(x < border, left, right)).astype(np.uint8)


def paint_stuff(rng: np.random.Generator, stuff: np.ndarray) -> np.ndarray:
    """Muted colours with a texture for each kind of stuff: a gradient, speckles or waves. Returns float BGR."""
    size = len(stuff)
    x, y = pixel_centres(size)
    noise = rng.normal(0, 1, (size, size))
    waves = np.sin(2 * np.pi * (y + 0.3 * size * np.sin(2 * np.pi * x / size) / 10) / 6)
    looks = {
        'sky-other': ((215, 190, 165), 40 * y / size + 2 * noise),
        'grass': ((70, 115, 85), 22 * noise),
        'sand': ((140, 175, 190), 9 * noise),
        'sea': ((135, 105, 75), 14 * waves + 4 * noise),
    }
    image = np.zeros((size, size, 3))
    for name, (colour, texture) in looks.items():
        mask = stuff == STUFF[name]
        image[mask] = (np.array(colour) + rng.normal(0, 8, 3) + texture[..., None])[mask]
    return image


def make_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draws one image. Object edges are not smoothed: each pixel belongs to the object that covers its centre."""
    shapes, instances = place_shapes(rng, size)
    semantic = stuff_map(rng, size)
    image = paint_stuff(rng, semantic)
    shade = rng.normal(0, 6, (size, size, 1))
    for index, shape in enumerate(shapes, 1):
        mask = instances == index
        image[mask] = (np.array(shape.colour) + shade)[mask]
        semantic[mask] = THINGS.index(shape.kind)
    return Scene(shapes, np.clip(np.rint(image), 0, 255).astype(np.uint8), instances, semantic)


def annotate(scene: Scene) -> list[dict]:
    """COCO annotations of a scene, without their ids. Masks are run-length encoded, which is exact, unlike polygons."""
    annotations = []
    for index, shape in enumerate(scene.shapes, 1):
        mask = scene.instances == index
        rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left, top = int(columns[0]), int(rows[0])
        annotations.append(
            {
                'category_id': THINGS.index(shape.kind) + 1,
                'bbox': [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                'area': int(mask.sum()),
                'segmentation': {'size': list(mask.shape), 'counts': rle['counts'].decode()},
                'iscrowd': 0,
            }
        )
    return annotations


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes an image; raises OSError if OpenCV cannot write it."""
    if not cv2.imwrite(str(path), image):
        raise OSError(f'cannot write {path}')


def write_split(root: Path, split: str, first_id: int, count: int, size: int, seeds: tuple[int, int]) -> None:
    """Writes the images, maps and annotations of one split. Each image has its own seed."""
    folders = {name: root / name / f'{split}2017' for name in ('.', 'stuffthingmaps', 'labels')}
    for folder in folders.values():
        folder.mkdir(parents=True)
    images, annotations = [], []
    for index in range(count):
        scene = make_scene(np.random.default_rng((*seeds, index)), size)
        image_id = first_id + index
        write_image(folders['.'] / f'{image_id:012d}.jpg', scene.image)
        write_image(folders['stuffthingmaps'] / f'{image_id:012d}.png', scene.semantic)
        labels = np.searchsorted(LABELS, scene.semantic).astype(np.uint8)
        write_image(folders['labels'] / f'{image_id:012d}.png', labels)
        images.append({'id': image_id, 'file_name': f'{image_id:012d}.jpg', 'width': size, 'height': size})
        for annotation in annotate(scene):
            # Ids start above 0, which COCO's evaluation takes for "not matched", and differ between the splits.
            annotation_id = first_id * OBJECTS_PER_IMAGE[1] + len(annotations)
            annotations.append({'id': annotation_id, 'image_id': image_id, **annotation})
        if (index + 1) % 200 == 0 or index + 1 == count:
            print(f'{split}: {index + 1} of {count} images', flush=True)
    content = {
        'info': {'description': DESCRIPTION},
        'images': images,
        'annotations': annotations,
        'categories': [{'id': i, 'name': name, 'supercategory': 'shape'} for i, name in enumerate(THINGS, 1)],
    }
    path = root / 'annotations' / f'instances_{split}2017.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def is_new_or_marked(out: Path, mark: str) -> bool:
    """Whether OUT does not exist, is empty, or has the file by which a tool marks its data sets."""
    if not out.is_dir():
        return not out.exists()
    return (out / mark).is_file() or not any(out.iterdir())


def may_replace(out: Path) -> bool:
    """Whether OUT does not exist, is empty, or is an earlier data set of this tool."""
    if not out.exists():
        return True
    if not out.is_dir():
        return False
    annotations = out / 'annotations' / 'instances_val2017.json'
    if annotations.is_file():
        return json.loads(annotations.read_text()).get('info', {}).get('description') == DESCRIPTION
    return not any(out.iterdir())


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """Yields a temporary folder next to OUT and renames it to OUT at the end, so that OUT is never incomplete."""
    partial = out.with_name(out.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


def make_dataset(out: Path, train: int, val: int, size: int, seed: int) -> None:
    """Writes the data set."""
    with whole_or_nothing(out) as root:
        write_split(root, 'train', 1, train, size, (seed, 0))
        write_split(root, 'val', 1 + train, val, size, (seed, 1))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='folder to make')
    parser.add_argument('--train', type=int, default=800, help='number of training images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=100, help='number of validation images (default: %(default)s)')
    parser.add_argument('--size', type=int, default=256, help='side of an image in pixels (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='another seed gives other images (default: %(default)s)')
    args = parser.parse_args(argv)
    for name, least in (('train', 1), ('val', 1), ('size', MIN_SIZE), ('seed', 0)):
        if getattr(args, name) < least:
            parser.error(f'--{name} is {getattr(args, name)}, give at least {least}')
    if not may_replace(args.out):
        parser.error(f'{args.out} exists and is not a data set of this tool: delete it or choose another folder')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the data set that the command line asks for."""
    args = parse_args(argv)
    make_dataset(args.out, args.train, args.val, args.size, args.seed)
    print(f'{args.out}: images of {args.size} x {args.size} pixels with {", ".join(THINGS)} before {", ".join(STUFF)}')


if __name__ == '__main__':
    sys.exit(main())
