"""Colours of masks in the pictures of `make demo`."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import VISUALIZERS
from mmengine.structures import InstanceData

DEMO = Path(__file__).parents[2] / 'configs/det/htc_swinv2_demo.py'
GREY = 100


def test_demo_draws_ground_truth_and_predictions_in_the_colors_of_their_classes(tmp_path):
    pytest.importorskip('mmdet')
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    cfg = Config.fromfile(DEMO)
    visualizer = VISUALIZERS.build(cfg.visualizer)
    visualizer.dataset_meta = cfg.metainfo
    masks = np.zeros((3, 64, 200), np.uint8)
    for label in range(3):  # at the lower right of its box, whose label is at the upper left
        masks[label, 40:60, 60 * label + 40 : 60 * label + 60] = 1
    found = dict(
        labels=torch.arange(3), bboxes=torch.tensor([[60 * label + 5, 5, 60 * label + 62, 62] for label in range(3)])
    )
    sample = DetDataSample(
        gt_instances=InstanceData(masks=BitmapMasks(masks, 64, 200), **found),
        pred_instances=InstanceData(masks=torch.from_numpy(masks).bool(), scores=torch.ones(3), **found),
    )

    image = np.full((64, 200, 3), GREY, np.uint8)
    visualizer.add_datasample('image', image, sample, out_file=str(tmp_path / 'image.png'))

    drawn = cv2.imread(str(tmp_path / 'image.png'))[..., ::-1].astype(float)
    alpha = cfg.visualizer.alpha
    for half in np.split(drawn, 2, axis=1):
        for mask, color in zip(masks, cfg.metainfo.palette, strict=True):
            inside = cv2.erode(mask, np.ones((9, 9))).astype(bool)
            assert inside.any()
            np.testing.assert_allclose(
                half[inside], np.broadcast_to((1 - alpha) * GREY + alpha * np.array(color), half[inside].shape), atol=2
            )
