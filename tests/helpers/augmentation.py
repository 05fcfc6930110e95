"""Random crops and flips of mmpretrain, against torchvision and Pillow."""

import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from PIL import Image
from torchvision.transforms import RandomResizedCrop

DRAWS = 2000


def assert_crops(cfg: dict, side: int, area: tuple[float, float], interpolation: Image.Resampling) -> None:
    """Crops of an area and of aspect ratio 3/4 to 4/3, resized to a square."""
    transform = TRANSFORMS.build(cfg)
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    np.random.seed(0)
    torch.manual_seed(0)
    picture, ratio = Image.fromarray(image), (3 / 4, 4 / 3)
    found = np.array([transform.rand_crop_params(image) for _ in range(DRAWS)])
    expected = np.array([RandomResizedCrop.get_params(picture, area, ratio) for _ in range(DRAWS)])
    for measure in (lambda h, w: h * w / image[..., 0].size, lambda h, w: np.log(w / h)):
        quantiles = [np.quantile(measure(*boxes[:, 2:].T), np.linspace(0, 1, 5)) for boxes in (found, expected)]
        np.testing.assert_allclose(*quantiles, atol=0.05)

    transform.rand_crop_params = lambda image: (20, 30, 200, 220)
    expected = picture.crop((30, 20, 250, 220)).resize((side, side), interpolation)
    np.testing.assert_array_equal(transform(dict(img=image))['img'], expected)


def assert_flips(cfg: dict) -> None:
    """Half of the images are flipped horizontally, the others stay."""
    transform, image = TRANSFORMS.build(cfg), np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    np.random.seed(0)
    found = [transform(dict(img=image, img_shape=(2, 2)))['img'].tolist() for _ in range(DRAWS)]
    flipped, same = (found.count(x.tolist()) / DRAWS for x in (image[:, ::-1], image))
    assert flipped + same == 1
    assert abs(flipped - 0.5) < 0.05
