"""The task of the study: in which of eight directions does one mark lie from another?

A scene is a set of discs at random places. Its label is the direction from the first disc, which is red, to the second,
which is blue; the others distract. Colours tell the discs apart, so that a scene looks the same at every size, and only
places decide about the label.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DIRECTIONS = 8
COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.2, 0.9], [0.1, 0.7, 0.2], [0.9, 0.8, 0.1], [0.9, 0.9, 0.9]])
RADIUS = 0.07  # of the discs, where 1 is the side of the image
DISTANCE = 0.25  # smallest distance of two centres: two tokens of the last stage at the training size


class Scenes(NamedTuple):
    """Scenes as numbers; the side of an image is 1."""

    places: Tensor  # (N, discs, 2), x and y of the centres; y points down
    grey: Tensor  # (N,), of the background, from 0 to 0.5
    labels: Tensor  # (N,), direction from disc 0 to disc 1 in steps of 45 degrees, from the x axis towards the y axis

    def select(self, index: Tensor | slice) -> 'Scenes':
        """Some of the scenes."""
        return Scenes(*(values[index] for values in self))


def make_scenes(count: int, seed: int) -> Scenes:
    """Draw scenes at random. Discs do not touch each other or the border."""
    rng = np.random.default_rng(seed)
    places = np.zeros((count, len(COLOURS), 2))
    pairs = np.triu_indices(len(COLOURS), 1)
    todo = np.arange(count)
    while len(todo):
        places[todo] = rng.uniform(RADIUS, 1 - RADIUS, (len(todo), *places.shape[1:]))
        offsets = places[todo][:, pairs[0]] - places[todo][:, pairs[1]]
        todo = todo[(np.linalg.norm(offsets, axis=-1) < DISTANCE).any(1)]
    x, y = (places[:, 1] - places[:, 0]).T
    labels = np.round(np.arctan2(y, x) / (2 * np.pi / DIRECTIONS)).astype(int) % DIRECTIONS
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
