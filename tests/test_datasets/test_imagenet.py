"""Test images of the classification configs are those of the official evaluation; labels of ImageNet-V2."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from tool_runs import REPOSITORY

import swinv2_mm  # noqa: F401  before torchvision, see `compat`

pytest.importorskip('mmpretrain')
from torchvision import transforms

from swinv2_mm.datasets.imagenet_v2 import ImageNetV2

DATA = Path(os.environ.get('SWINV2_MM_DATA', REPOSITORY.parent / 'shared' / 'data'))
REAL = sorted((*DATA.glob('coco_mini/val2017/*.jpg'), *DATA.glob('ade_mini/images/*/*.jpg')))[:20]
BICUBIC = transforms.InterpolationMode.BICUBIC
# config: the official evaluation, data/build.py with IMG_SIZE and TEST.CROP of the size's yaml
OFFICIAL = {
    'swinv2_b_w16_in1k_256': [transforms.Resize(292, BICUBIC), transforms.CenterCrop(256)],
    'swinv2_b_in22k_192': [transforms.Resize(219, BICUBIC), transforms.CenterCrop(192)],
    'swinv2_l_w24_in22kto1k_384': [transforms.Resize((384, 384), BICUBIC)],
}
NORMALIZE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def write_images(folder: Path) -> list[Path]:
    """Write noise on gradients: odd sizes around those of the tests, and files that are not upright RGB JPEGs."""
    generator = np.random.default_rng(0)

    def image(width: int, height: int) -> Image.Image:
        ramp = np.add.outer(np.arange(height), np.arange(width)) * 255 / (width + height)
        return Image.fromarray((ramp[..., None] * 0.7 + generator.uniform(0, 76, (height, width, 3))).astype(np.uint8))

    sizes = ((500, 375), (375, 500), (333, 501), (292, 292), (293, 291), (219, 613), (61, 47), (1, 3), (1201, 257))
    files = {f'{width}x{height}.jpg': image(width, height) for width, height in sizes}
    files |= {'grey.jpg': image(320, 243).convert('L'), 'cmyk.jpg': image(243, 320).convert('CMYK')}
    files |= {'palette.png': image(300, 200).convert('P'), 'alpha.png': image(300, 201).convert('RGBA')}
    for name, content in files.items():
        content.save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image(300, 200).save(folder / 'turned.jpg', exif=exif)
    return sorted(folder.iterdir())


def check(name: str, paths: list[Path]) -> None:
    """Hold the test pipeline of a config, and the normalized input of its model, against the official evaluation."""
    cfg = Config.fromfile(REPOSITORY / f'configs/cls/{name}.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        pipeline = Compose(cfg.test_dataloader.dataset.pipeline)
        preprocessor = MODELS.build(dict(cfg.model.data_preprocessor, type='ClsDataPreprocessor'))
    for path in paths:
        item = pipeline(dict(img_path=str(path)))
        with Image.open(path) as image:
            pixels = transforms.Compose([*OFFICIAL[name], transforms.PILToTensor()])(image.convert('RGB'))
        assert torch.equal(item['inputs'].flip(0), pixels), path  # BGR and RGB
        normalized = preprocessor(pseudo_collate([item]), training=False)['inputs'][0]
        torch.testing.assert_close(normalized, NORMALIZE(pixels / 255), rtol=0, atol=1e-6)


@pytest.mark.parametrize('name', OFFICIAL)
def test_test_images_are_those_of_the_official_evaluation(name, tmp_path):
    check(name, write_images(tmp_path))


@pytest.mark.skipif(not REAL, reason=f'no images in {DATA}')
@pytest.mark.parametrize('name', OFFICIAL)
def test_real_test_images_are_those_of_the_official_evaluation(name):
    check(name, REAL)


def test_folders_of_imagenet_v2_are_indices_of_classes(tmp_path):
    for i in range(1000):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / 'a.jpeg').touch()
    dataset = ImageNetV2(data_root=str(tmp_path))
    assert [dataset.get_data_info(i)['img_path'] for i in range(3)] == [
        str(tmp_path / name / 'a.jpeg') for name in ('0', '1', '10')
    ]
    assert dataset.get_gt_labels()[:3].tolist() == [0, 1, 10]
    assert sorted(dataset.get_gt_labels()) == list(range(1000))
    (tmp_path / '999').rename(tmp_path / 'n01440764')
    with pytest.raises(ValueError, match='n01440764 is not named by the index of a class'):
        ImageNetV2(data_root=str(tmp_path))
