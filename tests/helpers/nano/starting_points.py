"""DINO, Mask2Former, Faster R-CNN and RetinaNet at a nano size, on SwinV2 and on Swin V1."""

import copy

from mmengine.config import Config

from nano import ARCH, CHANNELS, shrink_inputs

FACTOR = 8  # 1024 pixels become 128
SIZES = dict(
    **dict(feedforward_channels=32, num_layers=2, num_queries=10, num_dn_queries=4),
    **dict(stacked_convs=1, fc_out_channels=32),
    **dict(nms_pre=50, max_per_img=10, max_per_image=10, num=16, score_thr=0.0),  # of an untrained model
)
# not for DINO, where mmdet has written some of them into the code
WIDTHS = dict(embed_dims=32, num_feats=16, feat_channels=32, out_channels=32)


def shrink_model(model: dict) -> dict:
    """The model's config with a nano backbone of its class, and few channels, layers and queries elsewhere."""
    backbone = copy.deepcopy(model.backbone)
    model = with_sizes(model, SIZES if model.type == 'DINO' else SIZES | WIDTHS)
    backbone.update(init_cfg=None, **(dict(arch=ARCH) if 'arch' in backbone else ARCH))
    model.backbone = backbone
    first = next(key for key in ('neck', 'panoptic_head', 'decode_head') if key in model)
    model[first].in_channels = [CHANNELS[i] for i in backbone.get('out_indices', range(4))]
    for head in (model.get('rpn_head'), model.get('bbox_head'), model.get('roi_head', {}).get('bbox_head')):
        if head and 'in_channels' in head:
            head.in_channels = WIDTHS['out_channels']
    if 'num_points' in model.get('train_cfg', {}):
        model.train_cfg.num_points = 64  # at which masks are compared
    return model


def with_sizes(value, sizes: dict[str, int], key: str = ''):
    """A config value with other numbers at some keys."""
    if isinstance(value, dict):
        return type(value)({k: with_sizes(v, sizes, k) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(with_sizes(item, sizes, key) for item in value)
    return sizes.get(key, value)


def shrink(cfg: Config) -> Config:
    """The config as one step of training of a nano model on small images."""
    cfg.model = shrink_model(cfg.model)
    shrink_inputs(cfg, FACTOR)
    cfg.train_dataloader.batch_size = 2
    cfg.train_dataloader.dataset.indices = 2
    iterations = 'max_iters' in cfg.train_cfg
    cfg.train_cfg.update({'max_iters' if iterations else 'max_epochs': 1, 'val_interval': 1})
    cfg.train_cfg.pop('dynamic_intervals', None)
    return cfg
