"""Training on real ADE20K images, and known metrics. Skipped without the sample data in $SWINV2_MM_DATA."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from nano.seg import shrink
from tool_runs import REPOSITORY, call, call_together, check_training, metrics

from swinv2_mm.cli import launch

pytest.importorskip('mmseg')
DATA = Path(os.environ.get('SWINV2_MM_DATA', REPOSITORY.parent / 'shared' / 'data')) / 'ade_mini'
CONFIG = str(REPOSITORY / 'configs/seg/upernet_swinv2_t.py')
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f'{DATA} does not exist')


def test_metric_of_stored_predictions():
    """With the data set and metric of the config; independent code computed the expected values, to six digits."""
    from mmseg.registry import DATASETS, METRICS

    cfg = launch.load_config(CONFIG, dict(data_root=str(DATA)))
    with DefaultScope.overwrite_default_scope('mmseg'):
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = dataset.metainfo
    for item in dataset:
        sample = item['data_samples']
        stored = cv2.imread(str(DATA / 'predictions/validation' / Path(sample.seg_map_path).name), cv2.IMREAD_UNCHANGED)
        prediction = torch.from_numpy(stored.astype(np.int64) - 1)  # 0 is "unlabelled"
        metric.process({}, [dict(pred_sem_seg=dict(data=prediction), gt_sem_seg=dict(data=sample.gt_sem_seg.data))])
    expected = json.loads((DATA / 'expected_metrics.json').read_text())['_pooled_5']
    areas = [sum(part) for part in zip(*metric.results, strict=True)]
    exact = metric.total_area_to_metrics(*areas, ['mIoU'])
    assert float(exact['aAcc']) == pytest.approx(expected['aAcc'], abs=1e-6)
    assert np.nanmean(exact['IoU']) == pytest.approx(expected['mIoU'], abs=1e-6)
    assert np.nanmean(exact['Acc']) == pytest.approx(expected['mAcc_gt_classes'], abs=1e-6)
    reported = metric.evaluate(len(dataset))
    assert (reported['aAcc'], reported['mIoU']) == (84.67, 43.78)


@pytest.mark.slow
def test_segmentor_trains_on_real_images_on_two_processes(tmp_path):
    """SwinV2-T's recipe at a nano size. Two processes test three images, one of them twice; then one tests all five."""
    cfg = shrink(launch.load_config(CONFIG, dict(data_root=str(DATA))))
    cfg.tta_pipeline[-1].transforms[0] = cfg.tta_pipeline[-1].transforms[0][:2]
    cfg.dump(tmp_path / 'config.py')
    call_together(tmp_path, 'train.py', 'config.py', '--no-validate', '--work-dir', 'out')
    check_training(tmp_path / 'out')
    checkpoint = tmp_path / 'out/iter_1.pth'
    three = ['--tta', '--cfg-options', 'test_dataloader.dataset.indices=3']
    call_together(tmp_path, 'test.py', 'config.py', checkpoint, '--work-dir', 'two', *three)
    call(tmp_path, 'test.py', 'config.py', checkpoint, '--work-dir', 'one', *three)
    one, two = metrics(tmp_path / 'one'), metrics(tmp_path / 'two')
    for key in ('aAcc', 'mIoU', 'mAcc'):
        assert one[key] == two[key]

    slide = ['model.test_cfg.mode=slide', 'model.test_cfg.crop_size=(64,64)', 'model.test_cfg.stride=(48,48)']
    drawn = ['--out', 'labels', '--show-dir', 'drawn', '--cfg-options', *slide]
    call(tmp_path, 'test.py', 'config.py', checkpoint, *drawn)
    names = {path.stem for path in (DATA / 'images/validation').iterdir()}
    assert {path.stem for path in (tmp_path / 'labels').glob('*.png')} == names
    for path in (tmp_path / 'labels').glob('*.png'):
        truth = cv2.imread(str(DATA / f'annotations/validation/{path.name}'), cv2.IMREAD_UNCHANGED)
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert labels.shape == truth.shape
    assert len(list(tmp_path.glob('drawn/**/*.png'))) + len(list(tmp_path.glob('drawn/**/*.jpg'))) == len(names)
