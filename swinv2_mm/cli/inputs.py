"""Shapes of the inputs of a config's model, and random batches of them."""

from collections.abc import Sequence

import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import get_object_from_string
from torch import nn

DATA_SAMPLES = {
    'mmdet': 'mmdet.structures.DetDataSample',
    'mmseg': 'mmseg.structures.SegDataSample',
    'mmpretrain': 'mmpretrain.structures.DataSample',
    'mmaction': 'mmaction.structures.ActionDataSample',
}
DEFAULT_SHAPES = {'mmdet': [800, 1280], 'mmseg': [1024, 2048], 'mmpretrain': [224, 224], 'mmaction': [224, 224]}
DEFAULT_CLIP = [32, 224, 224]  # for video models with a time axis
# transforms of classifiers after which all images have the same size: the option, and whether its order is (W, H)
FIXED_SIZES = {
    'RandomResizedCrop': ('scale', False),
    'RandomCrop': ('crop_size', False),
    'Resize': ('scale', True),
    'CenterCrop': ('crop_size', True),
}
OBJECTS = 100  # per image of a random batch; the most crowded images of COCO have about as many


def toolbox(cfg: Config) -> str:
    """Toolbox of a config, by its `default_scope`.

    Raises:
        ValueError: `default_scope` is not one of the toolboxes.
    """
    scope = cfg.get('default_scope')
    if scope not in DATA_SAMPLES:
        raise ValueError(f'default_scope of the config must be one of {", ".join(DATA_SAMPLES)}, got {scope!r}')
    return scope


def input_shape(cfg: Config, shape: list[int] | None) -> tuple[int, ...]:
    """Shape of one sample's input, before preprocessing, from the numbers of `--shape`.

    Args:
        cfg: The config; a video model takes (clips, C, T, H, W) or (frames, C, H, W), as its `format_shape` says; of
            actions of persons, (C, T, H, W).
        shape: (side,), (H, W), for video (T, H, W) or the full shape; None for the default of the toolbox.

    Returns:
        (C, H, W) for images, or the input shape of the video model.

    Raises:
        ValueError: The numbers do not fit the toolbox or the model.
    """
    scope = toolbox(cfg)
    three_axes = (cfg.model.get('data_preprocessor') or {}).get('format_shape', 'NCHW') == 'NCTHW'
    numbers = shape or (DEFAULT_CLIP if scope == 'mmaction' and three_axes else DEFAULT_SHAPES[scope])
    if min(numbers) < 1:
        raise ValueError(f'--shape must be positive numbers, got {join_numbers(numbers)}')
    size = numbers * 2 if len(numbers) == 1 else numbers
    channels = cfg.model.get('backbone', {}).get('in_channels', 3)
    if scope != 'mmaction':
        if len(size) != 2:
            raise ValueError(f'--shape of an image takes one or two numbers (H W), got {join_numbers(numbers)}')
        return (channels, *size)
    clips = () if 'roi_head' in cfg.model else (1,)  # the detectors of mmaction have no axis of clips
    axes = 4 + len(clips) if three_axes else 4
    if len(size) == axes:
        return tuple(size)
    if len(size) not in ((3,) if three_axes else (2, 3)):
        kind = 'T H W' if three_axes else 'H W, or T H W for T frames'
        raise ValueError(f'--shape of this video model takes {kind}, or all {axes} axes, got {join_numbers(numbers)}')
    frames, size = (size[0] if len(size) == 3 else 1), tuple(size[-2:])
    return (*clips, channels, frames, *size) if three_axes else (frames, channels, *size)


def join_numbers(numbers: Sequence[int]) -> str:
    """Numbers as they are passed to `--shape`."""
    return ' '.join(map(str, numbers))


def training_shape(cfg: Config, shape: list[int] | None) -> tuple[int, ...]:
    """Shape of one sample in training, as `input_shape` returns it.

    Args:
        cfg: The config.
        shape: Numbers of `--shape`, or None for the training size of the config.

    Raises:
        ValueError: The numbers do not fit, or it is None and the config has no fixed size.
    """
    toolbox(cfg)
    numbers = shape or _fixed_size(cfg)
    if numbers is None:
        raise ValueError(
            'the config has no fixed training size: '
            f'set one with --shape {"T " if cfg.default_scope == "mmaction" else ""}H W'
        )
    return input_shape(cfg, list(numbers))


def _fixed_size(cfg: Config) -> Sequence[int] | None:
    """(H, W), or (T, H, W) for video, if all training samples have the same size."""
    preprocessor = cfg.model.get('data_preprocessor') or {}
    dataset = cfg.train_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    steps = {str(step.type).split('.')[-1]: step for step in dataset.get('pipeline') or ()}  # the last one of each type
    if cfg.default_scope == 'mmseg':
        return preprocessor.get('size')
    if cfg.default_scope == 'mmpretrain':
        return _last_size(dataset.get('pipeline') or ())
    for augment in preprocessor.get('batch_augments') or ():
        if augment.type == 'BatchFixedSizePad':
            return augment.size
    resize = steps.get('Resize', {})
    is_video = cfg.default_scope == 'mmaction'
    if 'scale' not in resize or resize.get('keep_ratio', is_video):  # the default of mmaction is True
        return None
    width, height = resize.scale
    return (steps['SampleFrames'].clip_len, height, width) if is_video else (height, width)


def _last_size(pipeline: Sequence[dict]) -> Sequence[int] | None:
    """(H, W) after the last of `FIXED_SIZES`, unless a transform after it keeps the aspect ratio."""
    for step in reversed(pipeline):
        kind = str(step.type).split('.')[-1]
        if kind == 'ResizeEdge' or step.get('keep_ratio'):
            break
        if kind in FIXED_SIZES:
            option, width_first = FIXED_SIZES[kind]
            size = [step[option]] * 2 if isinstance(step[option], int) else step[option]
            return size[::-1] if width_first else size
    return None


def random_data(cfg: Config, shape: tuple[int, ...]) -> dict[str, list]:
    """One random sample in the format of a data loader: uint8 input of `shape`, and its data sample.

    Of targets, the class of an image or a video is set, and SimMIM's mask; `random_batch` adds those of detection and
    segmentation.
    """
    sample = get_object_from_string(DATA_SAMPLES[cfg.default_scope])()
    size = shape[-2:]
    sample.set_metainfo(dict(img_id=0, ori_shape=size, img_shape=size, pad_shape=size, scale_factor=(1.0, 1.0)))
    if cfg.default_scope in ('mmaction', 'mmpretrain'):
        sample.set_gt_label(0)
    if cfg.model.get('type') == 'SimMIM':
        patch = cfg.model.backbone.get('patch_size', 4)
        sample.set_mask(torch.ones([side // patch for side in size], dtype=torch.int64))
    return dict(inputs=[torch.randint(0, 256, shape, dtype=torch.uint8)], data_samples=[sample])


def random_batch(
    cfg: Config, shape: tuple[int, ...], samples: int, model: nn.Module, objects: int = OBJECTS
) -> dict[str, list]:
    """Random samples with targets, in the format of a data loader; of detection, with `objects` objects per image."""
    batch = dict(inputs=[], data_samples=[])
    for _ in range(samples):
        data = random_data(cfg, shape)
        (sample,) = data['data_samples']
        if cfg.default_scope == 'mmdet':
            _add_objects(sample, shape[-2:], model, objects)
        elif hasattr(model, 'roi_head'):  # actions of persons, in mmaction
            _add_objects(sample, shape[-2:], model, objects)
            sample.gt_instances.labels = torch.ones(objects, model.roi_head.bbox_head.num_classes)
        elif cfg.default_scope == 'mmseg':
            sample.gt_sem_seg = PixelData(data=torch.zeros(1, *shape[-2:], dtype=torch.int64))
        batch['inputs'] += data['inputs']
        batch['data_samples'].append(sample)
    return batch


def _add_objects(sample, size: tuple[int, int], model: nn.Module, objects: int) -> None:
    """Give a sample of mmdet objects of the first class, and the masks and segments that the model trains with."""
    corners = torch.rand(objects, 2, 2).sort(dim=1).values * torch.tensor(size[::-1])
    sample.gt_instances = InstanceData(bboxes=corners.flatten(1), labels=torch.zeros(objects, dtype=torch.int64))
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    if not getattr(model, 'with_rpn', True):
        sample.proposals = InstanceData(bboxes=corners.flatten(1))
    if getattr(model, 'with_mask', False) or any(hasattr(module, 'loss_mask') for module in model.modules()):
        from mmdet.structures.mask import BitmapMasks

        sample.gt_instances.masks = BitmapMasks(np.zeros((objects, *size), np.uint8), *size)
    if getattr(model, 'with_semantic', False) or getattr(model.data_preprocessor, 'pad_seg', False):
        sample.gt_sem_seg = PixelData(sem_seg=torch.zeros(1, *size, dtype=torch.uint8))
