"""The task of the study: in which direction does one mark lie from another?

A scene is a set of discs at random places. Its label is the direction from the first disc, which is red, to the second,
which is blue; the third distracts. Colours tell the discs apart, so that a scene looks the same at every size, and only
places decide about the label.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DIRECTIONS = 4
COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.2, 0.9], [0.1, 0.7, 0.2]])
RADIUS = 0.1  # of the discs, where 1 is the side of the image
LENGTHS = 0.3, 0.45  # distance of the two marks: more than a merged cell at the training size
GAP = 0.25  # smallest distance of two centres


class Scenes(NamedTuple):
    """Scenes as numbers; the side of an image is 1."""

    places: Tensor  # (N, discs, 2), x and y of the centres; y points down
    grey: Tensor  # (N,), of the background, from 0 to 0.5
    labels: Tensor  # (N,), direction from disc 0 to disc 1: 0 right, 1 down, 2 left, 3 up

    def select(self, index: Tensor | slice) -> 'Scenes':
        """Some of the scenes."""
        return Scenes(*(values[index] for values in self))


def make_scenes(count: int, seed: int) -> Scenes:
    """Draw scenes at random. Discs do not touch each other or the border."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, DIRECTIONS, count)
    places = np.zeros((count, len(COLOURS), 2))
    pairs = np.triu_indices(len(COLOURS), 1)
    todo = np.arange(count)
    while len(todo):
        drawn = rng.uniform(RADIUS, 1 - RADIUS, (len(todo), *places.shape[1:]))
        angles = (labels[todo] + rng.uniform(-0.5, 0.5, len(todo))) * (2 * np.pi / DIRECTIONS)
        lengths = rng.uniform(*LENGTHS, len(todo))
        drawn[:, 1] = drawn[:, 0] + lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        places[todo] = drawn
        near = (np.linalg.norm(drawn[:, pairs[0]] - drawn[:, pairs[1]], axis=-1) < GAP).any(1)
        outside = (np.abs(drawn[:, 1] - 0.5) > 0.5 - RADIUS).any(1)
        todo = todo[near | outside]
    grey = rng.uniform(0, 0.5, count)
    return Scenes(torch.from_numpy(places).float(), torch.from_numpy(grey).float(), torch.from_numpy(labels))


def render(scenes: Scenes, size: int) -> Tensor:
    """Render scenes with smooth borders: (N, 3, size, size), from -1 to 1."""
    pixels = (torch.arange(size) + 0.5) / size
    images = scenes.grey[:, None, None, None].expand(-1, 3, size, size)
    for disc, colour in enumerate(COLOURS):
        x, y = (pixels - scenes.places[:, disc, axis, None] for axis in (0, 1))
        distance = (y[:, :, None].square() + x[:, None, :].square()).sqrt()
        cover = ((RADIUS - distance) * size + 0.5).clamp(0, 1)[:, None]
        images = images.lerp(colour[:, None, None], cover)
    return 2 * images - 1
