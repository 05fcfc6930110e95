"""Trainings of a nano HTC on one or several processes, like those of a smaller model in `nano.training`.

mmdet normalizes most losses by counts of the local process. So one process trains on the joint batch as there: it takes
the images of all processes one by one and accumulates the gradients.
"""

import copy
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from tool_runs import make_shapes

from nano.det import narrow, shrink_model
from nano.training import IMAGES, START, STEPS, prepare

HTC = Path(__file__).parents[3] / 'configs/det/htc_swinv2_t.py'
SIZE, CHANNELS = 96, 64


def write_data(folder: Path) -> Path:
    """Write the training images and the initial weights of all trainings."""
    make_shapes(folder, train=IMAGES, val=1, size=SIZE)
    torch.manual_seed(0)
    model = MODELS.build(config(folder, folder).model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), folder / START)
    return folder


def config(folder: Path, data: Path, strategy: str = 'ddp', accumulate: int = 1, steps: int = STEPS) -> Config:
    """A nano HTC of SwinV2-T with what `configs/_base_/memory/{strategy}.py` adds; see `training.config`."""
    cfg = Config.fromfile(HTC)
    cfg.model = without_randomness(shrink_model(narrow(cfg.model, CHANNELS)))
    dataset = cfg.train_dataloader.dataset
    dataset.update(data_root=str(data), pipeline=[dict(step, _scope_='mmdet') for step in pipeline()])
    dataset.metainfo = dict(classes=('disk', 'square', 'triangle'))
    prepare(cfg, folder, data, strategy, accumulate, steps)
    return cfg


def detect(runner, threshold: float) -> torch.Tensor:
    """Scores of the boxes in the first image; above a threshold of 1 there are none, and no mask head runs."""
    model = runner.model
    item = copy.deepcopy(runner.train_dataloader.dataset[0])
    item['data_samples'].set_metainfo(dict(scale_factor=(1.0, 1.0)))
    model.module.roi_head.test_cfg.score_thr = threshold
    model.eval()
    with torch.no_grad():
        (sample,) = model.val_step({key: [value] for key, value in item.items()})
    return sample.pred_instances.scores


def pipeline() -> list[dict]:
    """Images and their annotations without augmentation."""
    return [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True, with_seg=True),
        dict(type='PackDetInputs'),
    ]


def without_randomness(model: dict) -> dict:
    """The model's config without drop path, with all RoIs as samples, and for small images."""
    model.backbone.update(drop_path_rate=0.0, window_size=4, with_cp=False)
    model.neck[0].drop_path_rate = 0.0
    for stage in (model.train_cfg.rpn, *model.train_cfg.rcnn):
        stage.sampler.num = 10**5
    model.train_cfg.rpn_proposal.max_per_img = 6
    for head in (*model.roi_head.mask_head, model.roi_head.semantic_head):
        head.num_convs = 1
    (pad,) = model.data_preprocessor.batch_augments
    pad.size = (SIZE, SIZE)
    return model
