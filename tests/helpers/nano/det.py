"""Detection: the recipes with few channels and small images, and tiny data sets like COCO and Objects365."""

import copy
import json
from pathlib import Path

from mmdet.datasets import CocoDataset, Objects365V2Dataset
from mmengine.config import Config
from tool_runs import make_shapes

from nano import ARCH, CHANNELS, shrink_inputs

FACTOR = 12  # 1536 pixels become 128


def shrink_model(model: dict) -> dict:
    """The model's config with a nano backbone and few RoIs; windows, heads and losses stay."""
    model = shrink_heads(model)
    model.backbone.update(arch=ARCH, init_cfg=None)
    *attention, fpn = model.neck if isinstance(model.neck, list) else [model.neck]
    fpn.in_channels = CHANNELS
    for layer in attention:
        layer.update(in_channels=CHANNELS[-1], num_heads=8)
    return model


def shrink_heads(model: dict) -> dict:
    """The model's config with few RoIs, and few channels of their features: these take most of a CPU's time."""
    model = copy.deepcopy(model)
    for stage in model.train_cfg.rcnn:
        stage.sampler.num = 16
    model.train_cfg.rpn_proposal.max_per_img = 50
    model.test_cfg.rpn.max_per_img = 5
    model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)  # the scores of an untrained model are low
    for head in model.roi_head.bbox_head:
        head.fc_out_channels = 64
    return model


def narrow(value, channels: int = 32, key: str = ''):
    """A model's config with fewer channels instead of 256, which take most of a CPU's time."""
    if isinstance(value, dict):
        return type(value)({k: narrow(v, channels, k) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(narrow(item, channels, key) for item in value)
    return channels if key.endswith('_channels') and value == 256 else value


def shrink(cfg: Config) -> Config:
    """The config as one step of training on small images."""
    cfg.model = narrow(shrink_model(cfg.model))
    return shrink_data(cfg)


def shrink_data(cfg: Config) -> Config:
    """The config with small images, as many as one process needs for one step."""
    shrink_inputs(cfg, FACTOR)
    if 'tta_model' in cfg:
        cfg.tta_model.tta_cfg.max_per_img = 5
    cfg.train_dataloader.dataset.indices = cfg.train_dataloader.batch_size
    cfg.train_cfg.update({'max_iters' if 'max_iters' in cfg.train_cfg else 'max_epochs': 1, 'val_interval': 1})
    cfg.optim_wrapper.accumulative_counts = 1
    return cfg


def write_shapes(folder: Path) -> Path:
    """Write two images for training and one for validation to `coco` and `objects365`, with their classes."""
    coco, objects365 = folder / 'coco', folder / 'objects365'
    make_shapes(coco, train=2, val=1, size=96)
    for split in ('train', 'val'):
        path = coco / f'annotations/instances_{split}2017.json'
        path.write_text(json.dumps(rename(json.loads(path.read_text()), CocoDataset.METAINFO['classes'])))
    write_objects365(coco, objects365)
    return folder


def write_objects365(coco: Path, folder: Path) -> None:
    """Write the images of `coco` in the layout of Objects365, without masks and with its first classes."""
    (folder / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (folder / split).mkdir()
        (folder / split / 'patch0').symlink_to(coco / f'{split}2017')
        data = json.loads((coco / f'annotations/instances_{split}2017.json').read_text())
        data = rename(data, Objects365V2Dataset.METAINFO['classes'])
        for image in data['images']:
            image['file_name'] = f'images/v1/patch0/{image["file_name"]}'
        for annotation in data['annotations']:
            del annotation['segmentation']
        (folder / f'annotations/zhiyuan_objv2_{split}.json').write_text(json.dumps(data))


def rename(data: dict, classes: tuple[str, ...]) -> dict:
    """Annotations with the categories of another data set, in their order."""
    ids = {category['id']: i for i, category in enumerate(data['categories'], 1)}
    return data | dict(
        categories=[dict(id=i, name=name) for i, name in enumerate(classes, 1)],
        annotations=[a | dict(category_id=ids[a['category_id']]) for a in data['annotations']],
    )
