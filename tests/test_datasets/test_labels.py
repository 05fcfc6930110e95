"""CheckLabels on label files read by mmsegmentation: valid ones pass, errors name the file."""

import cv2
import numpy as np
import pytest
from PIL import Image

pytest.importorskip('mmseg')
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope

NAME = 'swinv2_mm.datasets.labels.CheckLabels'
LABELS = np.arange(0, 151, dtype=np.uint8).repeat(2).reshape(2, 151)  # all of ADE20K, 0 being "unlabelled"


@pytest.fixture
def read(tmp_path):
    """Read a label map from a file, as ADE20K or with labels from 0."""

    def run(image: Image.Image, size=(2, 151), reduce_zero_label=True, num_classes=150):
        image.save(tmp_path / 'a.png')
        steps = [dict(type='LoadAnnotations', reduce_zero_label=reduce_zero_label)]
        with DefaultScope.overwrite_default_scope('mmseg'):
            pipeline = Compose([*steps, dict(type=NAME, num_classes=num_classes)])
        results = dict(
            seg_map_path=str(tmp_path / 'a.png'),
            seg_fields=[],
            ori_shape=size,
            label_map=None,
            reduce_zero_label=reduce_zero_label,
        )
        return pipeline(results)['gt_seg_map']

    return run


def test_check_labels_accepts_all_labels_of_ade20k(read):
    labels = read(Image.fromarray(LABELS))
    assert (labels == np.where(LABELS == 0, 255, LABELS.astype(int) - 1)).all()


def test_check_labels_accepts_a_palette_image(read):
    image = Image.fromarray(LABELS, mode='P')
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    assert (read(image) == read(Image.fromarray(LABELS))).all()


def test_check_labels_rejects_a_colour_image(read, tmp_path):
    with pytest.raises(
        ValueError,
        match=rf'{tmp_path}/a.png has the shape \(2, 151, 3\) of a colour image: it must have one index for each',
    ):
        read(Image.fromarray(LABELS).convert('RGB'))


def test_check_labels_rejects_the_label_map_of_another_image(read):
    with pytest.raises(ValueError, match=r'of size \(2, 151\), its image of size \(4, 4\)'):
        read(Image.fromarray(LABELS), size=(4, 4))


@pytest.mark.parametrize(
    ('reduce_zero_label', 'value', 'shown'), [(True, 151, 150), (True, 254, 253), (False, 150, 150)]
)
def test_check_labels_names_an_invalid_label(read, tmp_path, reduce_zero_label, value, shown):
    labels = LABELS % 150
    labels[1, 3] = value
    with pytest.raises(ValueError, match=rf'{tmp_path}/a.png contains \[{shown}\]: labels are 0 to 149, or 255'):
        read(Image.fromarray(labels), reduce_zero_label=reduce_zero_label)


def test_check_labels_accepts_ignored_pixels(read):
    labels = LABELS % 150
    labels[0, :5] = 255
    assert (read(Image.fromarray(labels), reduce_zero_label=False) == labels).all()


def test_missing_label_map_is_named(tmp_path):
    """Raised by the dataset of a config for an image without a label file."""
    from mmseg.registry import DATASETS
    from nano.seg import write_ade20k

    from swinv2_mm import config_path
    from swinv2_mm.cli import launch

    data = write_ade20k(tmp_path)
    cv2.imwrite(str(data / 'images/validation/2.jpg'), np.zeros((8, 8, 3), np.uint8))
    cfg = launch.load_config(config_path('seg/upernet_swinv2_t.py'), dict(data_root=str(data)))
    with DefaultScope.overwrite_default_scope('mmseg'):
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
    assert len(dataset) == 3
    with pytest.raises(FileNotFoundError, match='annotations/validation/2.png'):
        dataset[2]
