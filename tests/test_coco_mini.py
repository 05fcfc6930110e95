"""Training on real COCO images, and published metrics. Skipped without the sample data in $SWINV2_MM_DATA."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from tool_runs import REPOSITORY, call, call_together, check_training, metrics

from swinv2_mm.cli import launch

pytest.importorskip('mmdet')
from nano import trial_arguments
from nano.det import shrink_data, shrink_heads, shrink_model, write_objects365

DATA = Path(os.environ.get('SWINV2_MM_DATA', REPOSITORY.parent / 'shared' / 'data'))
OPTIONS = trial_arguments(REPOSITORY / 'configs/det')
needs = {
    name: pytest.mark.skipif(not (DATA / name).is_dir(), reason=f'{DATA / name} does not exist')
    for name in ('coco_mini', 'coco_metric_check')
}

REDUCED = """
_base_ = [__import__('swinv2_mm').config_path('det/{base}.py')]
data_root = '{root}/'
size = {size}
train_pipeline = [dict(type='LoadImageFromFile'),
                  dict(type='LoadAnnotations', with_bbox=True, with_mask=True, with_seg=True),
                  dict(type='RandomResize', scale=(size, size), ratio_range=(0.9, 1.1), keep_ratio=True),
                  dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(size, size), keep_ratio=True),
                 dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                 dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
train_dataloader = dict(num_workers=0, dataset=dict(data_root=data_root, pipeline=train_pipeline,
    data_prefix=dict(img='train2017/', seg='stuffthingmaps/train2017/')))
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator
"""

TTA = """
flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
tta_pipeline = [dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=[
    [dict(type='Resize', scale=(side, side), keep_ratio=True) for side in (size - 16, size, size + 16)],
    flips, [dict(type='PackDetInputs', meta_keys=meta_keys)]])]
"""


def write_semantic_maps(root: Path, annotations: dict) -> None:
    """Write maps as in COCO-Stuff, but only of things: category id - 1, and 255 elsewhere."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = annotations
    coco.createIndex()
    folder = root / 'stuffthingmaps' / 'train2017'
    folder.mkdir(parents=True)
    for image in annotations['images']:
        labels = np.full((image['height'], image['width']), 255, np.uint8)
        for annotation in coco.imgToAnns[image['id']]:
            labels[coco.annToMask(annotation) > 0] = annotation['category_id'] - 1
        cv2.imwrite(str(folder / image['file_name'].replace('.jpg', '.png')), labels)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """The sample as `coco`, with semantic maps, and in the layout and classes of Objects365, without masks."""
    folder = tmp_path_factory.mktemp('data')
    coco = folder / 'coco'
    coco.mkdir()
    for name in ('annotations', 'train2017', 'val2017'):
        (coco / name).symlink_to(DATA / 'coco_mini' / name)
    write_semantic_maps(coco, json.loads((coco / 'annotations/instances_train2017.json').read_text()))
    write_objects365(coco, folder / 'objects365')
    return folder


def write_config(name: str, data: Path, folder: Path, shrink=shrink_heads) -> Path:
    """A config with images of about 128 pixels, few RoIs, and one step of training for two processes."""
    root = data / ('objects365' if 'objects365' in name else 'coco')
    cfg = shrink_data(launch.load_config(str(REPOSITORY / f'configs/det/{name}.py'), dict(data_root=f'{root}/')))
    cfg.model = shrink(cfg.model)
    cfg.train_dataloader.dataset.indices *= 2
    for split in ('val', 'test'):
        cfg[f'{split}_dataloader'].dataset.indices = 3  # on two processes
    if 'tta_pipeline' in cfg:
        scales, limits = cfg.tta_pipeline[-1].transforms[0], cfg.tta_model.size_limits  # only the first and the last
        cfg.tta_pipeline[-1].transforms[0], cfg.tta_model.size_limits = scales[::5], limits[::5]
    cfg.dump(folder / f'{name}.py')
    return folder / f'{name}.py'


def check_metrics(found: dict, *kinds: str) -> None:
    """Assert that a test has logged the mAP of exactly these kinds."""
    results = {key: value for key, value in found.items() if key.endswith('_mAP')}
    assert results.keys() == {f'coco/{kind}_mAP' for kind in kinds}
    assert all(0 <= value <= 1 for value in results.values())


@needs['coco_mini']
@pytest.mark.slow
def test_cascade_trains_on_real_images_on_two_processes(data, tmp_path):
    """SwinV2-T's recipe, except for the sizes of backbone and images and the number of RoIs."""
    config = write_config('cascade_mask_rcnn_swinv2_t', data, tmp_path, shrink_model)
    call_together(tmp_path, 'train.py', config, '--work-dir', 'out', '--cfg-options', 'train_dataloader.batch_size=1')
    check_training(tmp_path / 'out')
    check_metrics(metrics_of_validation(tmp_path / 'out'), 'bbox', 'segm')


def metrics_of_validation(folder: Path) -> dict:
    """The metrics that the last validation of a training has logged."""
    return json.loads(max(folder.glob('20*/vis_data/scalars.json')).read_text().splitlines()[-1])


@needs['coco_mini']
@pytest.mark.slow
def test_objects365_then_coco_then_tta(data, tmp_path):
    """The pipeline of SwinV2-G: each step starts from the checkpoint of the one before."""
    first, second, systems = (
        write_config(name, data, tmp_path)
        for name in ('htc_swinv2_g_objects365', 'htc_swinv2_g', 'htc_swinv2_g_w48_tta')
    )
    call_together(tmp_path, 'train.py', first, '--work-dir', 'first', *OPTIONS)
    check_training(tmp_path / 'first')
    check_metrics(metrics_of_validation(tmp_path / 'first'), 'bbox')
    options = [*OPTIONS, 'load_from=first/iter_1.pth']
    log = call_together(tmp_path, 'train.py', second, '--work-dir', 'second', *options)
    check_training(tmp_path / 'second')
    assert 'size mismatch for roi_head.bbox_head.2.fc_cls.weight' in log
    assert 'size mismatch for backbone' not in log
    log = call_together(tmp_path, 'test.py', systems, 'second/iter_1.pth', '--tta', '--work-dir', 'tested', *OPTIONS)
    assert 'Load checkpoint from second/iter_1.pth' in log
    assert 'do not match exactly' not in log
    check_metrics(metrics(tmp_path / 'tested'), 'bbox', 'segm')


def simple_images(annotations: dict, number: int) -> dict:
    """The first images with up to four objects, all of them large and no crowds."""
    kept = []
    for image in sorted(annotations['images'], key=lambda i: i['id']):
        objects = [a for a in annotations['annotations'] if a['image_id'] == image['id']]
        large = all(a['area'] > 0.02 * image['width'] * image['height'] and not a['iscrowd'] for a in objects)
        if 1 <= len(objects) <= 4 and large:
            kept.append(image)
    ids = {image['id'] for image in kept[:number]}
    return annotations | dict(
        images=[i for i in annotations['images'] if i['id'] in ids],
        annotations=[a for a in annotations['annotations'] if a['image_id'] in ids],
    )


@needs['coco_mini']
@pytest.mark.slow
def test_nano_htc_overfits_five_images(tmp_path):
    """Fails if a pipeline mixes up images, boxes, masks, semantic maps or labels."""
    root = tmp_path / 'coco'
    (root / 'annotations').mkdir(parents=True)
    chosen = simple_images(json.loads((DATA / 'coco_mini/annotations/instances_train2017.json').read_text()), 5)
    assert len(chosen['images']) == 5
    for split in ('train', 'val'):
        (root / f'annotations/instances_{split}2017.json').write_text(json.dumps(chosen))
        (root / f'{split}2017').symlink_to(DATA / 'coco_mini' / 'train2017')
    write_semantic_maps(root, chosen)
    config = tmp_path / 'overfit.py'
    config.write_text(
        REDUCED.format(base='htc_swinv2_demo', root=root, size=128)
        + """
all_80 = dict(_delete_=True)  # not the classes of the demo
train_dataloader.update(batch_size=5)
for loader in (train_dataloader, val_dataloader):
    loader['dataset'].update(metainfo=all_80)
del loader
model = dict(
    rpn_head=dict(anchor_generator=dict(scales=[8])),
    roi_head=dict(
        bbox_head=[dict(head, num_classes=80) for head in _base_.model.roi_head.bbox_head],
        mask_head=[dict(head, num_classes=80) for head in _base_.model.roi_head.mask_head]))
max_epochs = 120  # of one step
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', begin=0, end=max_epochs, eta_min=1e-5, by_epoch=True)]
default_hooks = dict(checkpoint=dict(interval=max_epochs))
"""
    )
    call(tmp_path, 'train.py', config, '--work-dir', 'out')
    last = metrics_of_validation(tmp_path / 'out')
    assert last['coco/bbox_mAP'] >= 0.5
    assert last['coco/segm_mAP'] >= 0.35

    # with TTA: three of the training scales, and flips
    config.write_text(config.read_text() + TTA)
    checkpoint = (tmp_path / 'out/last_checkpoint').read_text()
    call(tmp_path, 'test.py', config, checkpoint, '--tta', '--work-dir', 'one')
    one = metrics(tmp_path / 'one')
    for kind in ('bbox', 'segm'):
        assert one[f'coco/{kind}_mAP'] >= last[f'coco/{kind}_mAP'] - 0.1  # a dozen objects

    # five images on two processes: one is tested twice, and must count once
    call_together(tmp_path, 'test.py', config, checkpoint, '--tta', '--work-dir', 'two')
    two = metrics(tmp_path / 'two')
    results = [key for key in one if key.startswith('coco/')]
    assert [one[key] for key in results] == [two[key] for key in results]


@needs['coco_metric_check']
@pytest.mark.parametrize(('kind', 'published'), [('bbox', (0.505, 0.697, 0.573)), ('segm', (0.320, 0.562, 0.299))])
def test_configured_metric_gives_published_results(kind, published):
    from mmdet.registry import METRICS
    from mmengine.config import Config

    folder = DATA / 'coco_metric_check'
    evaluator = Config.fromfile(REPOSITORY / 'configs/det/htc_swinv2_b.py').val_evaluator
    evaluator.update(ann_file=str(folder / 'instances_val2014_100.json'), metric=kind)
    metric = METRICS.build(evaluator)
    truth = json.loads((folder / 'instances_val2014_100.json').read_text())
    metric.dataset_meta = dict(classes=[c['name'] for c in truth['categories']])
    label_of = {c['id']: i for i, c in enumerate(truth['categories'])}
    results = json.loads((folder / f'instances_val2014_fake{kind}100_results.json').read_text())
    for image in truth['images']:
        mine = [r for r in results if r['image_id'] == image['id']]
        prediction = dict(
            scores=np.array([r['score'] for r in mine]),
            labels=np.array([label_of[r['category_id']] for r in mine], dtype=int),
            bboxes=np.array([corners(r, image) for r in mine]).reshape(-1, 4),
        )
        if kind == 'segm':
            prediction['masks'] = [r['segmentation'] for r in mine]
        metric.process(
            {},
            [
                dict(
                    img_id=image['id'],
                    ori_shape=(image['height'], image['width']),
                    pred_instances=as_tensors(prediction),
                )
            ],
        )
    results = metric.evaluate(len(truth['images']))
    got = tuple(results[f'coco/{kind}_mAP{suffix}'] for suffix in ('', '_50', '_75'))
    assert got == pytest.approx(published, abs=5e-4)


def corners(result: dict, image: dict) -> list[float]:
    """The predicted box, or the box of the predicted mask."""
    if 'bbox' in result:
        x, y, w, h = result['bbox']
    else:
        from pycocotools import mask

        x, y, w, h = mask.toBbox(result['segmentation'])
    return [x, y, x + w, y + h]


def as_tensors(prediction: dict) -> dict:
    import torch

    return {k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in prediction.items()}
