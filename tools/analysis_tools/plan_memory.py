"""Memory that training a config takes on each GPU, with and without each way to save some; needs no GPU and no data.

python tools/analysis_tools/plan_memory.py configs/det/htc_swinv2_g.py --gpus 8 --gpu-mem 40
python tools/analysis_tools/plan_memory.py configs/det/cascade_mask_rcnn_swinv2_t.py --gpus 8 --shape 800 1333

Parameters are counted on a model without memory, and activations by running a training step: of the backbone on tensors
that have shapes but no memory (`swinv2_mm.cli.memory`), of neck and heads on real ones, since what they compute
depends on data, with their convolutions and matrix products left out. Neck and heads get random features and as many
objects as a crowded image has. One GiB is 2**30 bytes; a "40 GB" GPU has about 40 GiB.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import swinv2_mm  # noqa: F401  before any toolbox: it mends what is broken in this environment
from swinv2_mm.cli import classes, launch
from swinv2_mm.cli.memory import (
    BackboneMemory,
    MemoryTracker,
    SkippedProducts,
    cuda_casts,
    cuda_chunks,
    make_fake,
    make_gradients,
    measure_backbone,
)
from swinv2_mm.models.block import SwinBlock

from get_flops import input_shape, random_data, toolbox  # isort: skip

GIB = 2**30
FLOAT32 = 4  # bytes; parameters, gradients and optimizer state are in float32, autocast makes its copies of them
OPTIMIZERS = {'Adam': 2, 'AdamW': 2}  # numbers that the state has for each parameter
DEEPSPEED_BUCKET = 500_000_000 * FLOAT32  # its default, of whatever model
CONTEXT = 1.5 * GIB  # of CUDA, its libraries and NCCL; assumed
OBJECTS = 100  # in an image; the fullest ones of COCO have about as many
MOST_SAMPLES = 3  # that the heads run on; more are extrapolated
SEQUENTIAL = (0, 1)  # stages of Sec. 3.4, for configs that name none


# ---------------------------------------------------------------- parameters and what belongs to them


@dataclass
class Counts:
    """Sizes of a model in bytes of float32.

    Attributes:
        parameters: Parameters and buffers.
        trained: Parameters that are trained.
        largest_block: The largest block of the backbone, which FSDP gathers as a whole.
        rest: All trained parameters that are in no block.
        ema: Copy of all parameters that an EMAHook keeps, or 0.
        optimizer: State of the optimizer.
    """

    parameters: int
    trained: int
    largest_block: int
    rest: int
    ema: int
    optimizer: int


@dataclass
class State:
    """Bytes that one way to distribute a training holds on each GPU during the whole step.

    `others` are DDP's buckets, DeepSpeed's bucket and second copy of its share of the parameters, FSDP's gathered
    blocks, and the copy of an EMAHook.
    """

    name: str
    parameters: float
    gradients: float
    optimizer: float
    others: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.parameters + self.gradients + self.optimizer + self.others


def count(cfg: Config) -> Counts:
    """Count the parameters of a config's model, without memory for them."""
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    trained = _trained(model)
    blocks = [_trained(module) for module in model.modules() if isinstance(module, SwinBlock)]
    parameters = sum(x.numel() for x in (*model.parameters(), *model.buffers())) * FLOAT32
    has_ema = any(str(hook.get('type')).endswith('EMAHook') for hook in cfg.get('custom_hooks') or ())
    return Counts(
        parameters=parameters,
        trained=trained,
        largest_block=max(blocks),
        rest=trained - sum(blocks),
        ema=parameters if has_ema else 0,
        optimizer=_numbers_of_state(cfg) * trained,
    )


def _numbers_of_state(cfg: Config) -> int:
    optimizer = cfg.optim_wrapper.optimizer.type
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f'optim_wrapper.optimizer.type: the state of {optimizer!r} is not known; known are {", ".join(OPTIMIZERS)}'
        )
    return OPTIMIZERS[optimizer]


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad) * FLOAT32


def states(counts: Counts, gpus: int) -> list[State]:
    """What each way to distribute a training over `gpus` GPUs holds on one of them.

    DDP is mmengine's; the others are those of configs/_base_/memory: zero1.py, deepspeed_zero2.py and fsdp.py.
    """
    c = counts
    if gpus == 1:
        return [State('one GPU', c.parameters, c.trained, c.optimizer, c.ema)]
    # a block and the one after it, which is gathered meanwhile, with their gradients; the rest stays gathered
    gathered = 2 * (2 * c.largest_block + c.rest)
    return [
        State('DDP', c.parameters, c.trained, c.optimizer, c.trained + c.ema),
        State('ZeRO-1', c.parameters, c.trained, c.optimizer / gpus, c.ema),
        State(
            'ZeRO-2', c.parameters, c.trained / gpus, c.optimizer / gpus, c.trained / gpus + DEEPSPEED_BUCKET + c.ema
        ),
        State('FSDP', c.parameters / gpus, c.trained / gpus, c.optimizer / gpus, gathered + c.ema),
    ]


def own_state(cfg: Config) -> str:
    """Name of the state that a config itself distributes its training by."""
    wrapper = str((cfg.get('model_wrapper_cfg') or {}).get('type')).split('.')[-1]
    stage = (cfg.get('strategy') or {}).get('zero_optimization', {}).get('stage')
    of_wrapper = {'ZeroDistributedDataParallel': 'ZeRO-1', 'FullyShardedModel': 'FSDP'}
    return of_wrapper.get(wrapper) or {1: 'ZeRO-1', 2: 'ZeRO-2', 3: 'FSDP'}.get(stage, 'DDP')


# ---------------------------------------------------------------- inputs


def training_shape(cfg: Config, shape: list[int] | None) -> tuple[int, ...]:
    """Shape of one sample in training, as `get_flops.input_shape` has it.

    Args:
        cfg: The config.
        shape: Numbers of `--shape`, or None for the size that the config trains at.

    Raises:
        ValueError: The numbers do not fit, or there are none and the config has no fixed size.
    """
    toolbox(cfg)
    numbers = shape or _fixed_size(cfg)
    if numbers is None:
        raise ValueError(
            'the config trains at sizes that vary, or that its pipeline does not tell: '
            f'give one, --shape {"T " if cfg.default_scope == "mmaction" else ""}H W'
        )
    return input_shape(cfg, list(numbers))


def _fixed_size(cfg: Config) -> Sequence[int] | None:
    """(H, W), or (T, H, W) for video, where all samples of a training have the same size."""
    preprocessor = cfg.model.get('data_preprocessor') or {}
    dataset = cfg.train_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    steps = {str(step.type).split('.')[-1]: step for step in dataset.get('pipeline') or ()}  # the last one of each kind
    if cfg.default_scope == 'mmseg':
        return preprocessor.get('size')
    for augment in preprocessor.get('batch_augments') or ():
        if augment.type == 'BatchFixedSizePad':
            return augment.size
    resize = steps.get('Resize', {})
    is_video = cfg.default_scope == 'mmaction'
    if 'scale' not in resize or resize.get('keep_ratio', is_video):  # the default of mmaction is True
        return None
    width, height = resize.scale
    return (steps['SampleFrames'].clip_len, height, width) if is_video else (height, width)


def random_batch(cfg: Config, shape: tuple[int, ...], samples: int, model: nn.Module) -> dict[str, list]:
    """Random samples with targets, as a data loader gives them."""
    batch = dict(inputs=[], data_samples=[])
    for _ in range(samples):
        data = random_data(cfg, shape)
        (sample,) = data['data_samples']
        if cfg.default_scope == 'mmdet':
            _add_objects(sample, shape[-2:], model)
        elif cfg.default_scope == 'mmseg':
            sample.gt_sem_seg = PixelData(data=torch.zeros(1, *shape[-2:], dtype=torch.int64))
        batch['inputs'] += data['inputs']
        batch['data_samples'].append(sample)
    return batch


def _add_objects(sample, size: tuple[int, int], model: nn.Module) -> None:
    """Give a sample of mmdet objects of the first class, and the masks and segments that the model trains with."""
    corners = torch.rand(OBJECTS, 2, 2).sort(dim=1).values * torch.tensor(size[::-1])
    sample.gt_instances = InstanceData(bboxes=corners.flatten(1), labels=torch.zeros(OBJECTS, dtype=torch.int64))
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    if getattr(model, 'with_mask', False):
        from mmdet.structures.mask import BitmapMasks

        sample.gt_instances.masks = BitmapMasks(np.zeros((OBJECTS, *size), np.uint8), *size)
    if getattr(model, 'with_semantic', False):
        sample.gt_sem_seg = PixelData(sem_seg=torch.zeros(1, *size, dtype=torch.uint8))


# ---------------------------------------------------------------- activations


@dataclass
class Activations:
    """What a step takes beside the state, with or without checkpointing and sequential attention, in bytes.

    Attributes:
        name: What saves memory.
        backbone: The backbone.
        heads: Peak of neck and heads, forward and backward, beside what the backbone keeps.
        is_config: Whether the config has it so.
    """

    name: str
    backbone: BackboneMemory
    heads: int
    is_config: bool

    @property
    def peak(self) -> int:
        """Peak of the step: in one of the backbone's passes, or while the heads run on top of what it keeps."""
        return max(self.backbone.forward_peak, sum(self.backbone.kept) + self.heads, self.backbone.backward_peak)


def is_bfloat16(cfg: Config) -> bool:
    """Whether a config trains with autocast to a type of 16 bits."""
    return str(cfg.optim_wrapper.get('type')).split('.')[-1] == 'AmpOptimWrapper'


def activations(cfg: Config, shape: tuple[int, ...]) -> list[Activations]:
    """Run a training step of a config with and without activation checkpointing.

    Where the config asks for the attention backend 'reference', each of them also with and without sequential
    attention. The others attend to a few windows at a time in any case.
    """
    samples = cfg.train_dataloader.batch_size
    own = cfg.model.backbone
    own_cp, own_sequential = own.get('with_cp', False), tuple(own.get('sequential_stages', ()))
    is_reference = own.get('attention_backend') == 'reference'
    if not is_reference:
        own_sequential = ()
    heads = None
    rows = []
    for with_cp in (False, own_cp or True):
        for stages in ((), own_sequential or SEQUENTIAL) if is_reference else ((),):
            backbone = backbone_memory(cfg, shape, samples, with_cp=with_cp, sequential_stages=stages)
            heads = heads_memory(cfg, shape, samples, backbone.outputs) if heads is None else heads
            names = ['checkpointing'] * bool(with_cp) + [f'sequential {_join(i + 1 for i in stages)}'] * bool(stages)
            is_config = (with_cp, stages) == (own_cp, own_sequential)
            rows.append(Activations(', '.join(names) or 'none', backbone, heads, is_config))
    return rows


def backbone_memory(cfg: Config, shape: tuple[int, ...], samples: int, **changes) -> BackboneMemory:
    """Run a training step of a config's backbone, with some arguments changed, on fake tensors."""
    with torch.device('meta'):
        backbone = MODELS.build(dict(cfg.model.backbone, init_cfg=None, **changes)).train()
    clips = shape[:-4] if cfg.default_scope == 'mmaction' else ()
    size = (samples * int(np.prod(clips)), *shape[len(clips) :])
    with FakeTensorMode(), cuda_chunks():
        return measure_backbone(make_fake(backbone), torch.empty(size), is_bfloat16(cfg))


def heads_memory(cfg: Config, shape: tuple[int, ...], samples: int, outputs: list[Tensor]) -> int:
    """Peak of neck and heads in a training step beside parameters, their gradients and the features, in bytes.

    Args:
        cfg: The config.
        shape: Shape of a sample.
        samples: Samples of a step.
        outputs: What the backbone puts out for them, on the meta device.
    """
    model = _build_heads(cfg, shape)
    few = min(samples, MOST_SAMPLES)
    peak = _run_heads(cfg, model, shape, few, outputs, samples)
    if few == samples:
        return peak
    return peak + (samples - few) * (peak - _run_heads(cfg, model, shape, few - 1, outputs, samples))


class _Features(nn.Module):
    """Random features in place of a backbone."""

    features: tuple[Tensor, ...]

    def forward(self, _: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.features[0] if len(self.features) == 1 else self.features


def _build_heads(cfg: Config, shape: tuple[int, ...]) -> nn.Module:
    """Build the model of a config without its backbone, on the CPU."""
    model = copy.deepcopy(cfg.model)
    model.backbone = dict(type='swinv2_mm.SwinTransformerV2')  # soon replaced; the config's own may be too large
    if cfg.default_scope == 'mmdet':
        model.data_preprocessor.batch_augments = None
    elif cfg.default_scope == 'mmseg':
        model.data_preprocessor.size = shape[-2:]
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(model)).train()
    model.backbone = _Features()
    make_gradients(model)
    return model


def _run_heads(
    cfg: Config, model: nn.Module, shape: tuple[int, ...], samples: int, outputs: list[Tensor], total: int
) -> int:
    torch.manual_seed(0)
    data = model.data_preprocessor(random_batch(cfg, shape, samples, model), True)
    model.backbone.features = tuple(
        torch.rand(x.shape[0] * samples // total, *x.shape[1:]).to(x.dtype).requires_grad_() for x in outputs
    )
    with cuda_casts(), SkippedProducts(), MemoryTracker() as tracker:
        with torch.autocast('cpu', torch.bfloat16, enabled=is_bfloat16(cfg)):
            loss = model.parse_losses(model(**data, mode='loss'))[0]
        loss.backward()
    return tracker.peak


# ---------------------------------------------------------------- output


def _join(numbers) -> str:
    return ' '.join(map(str, numbers))


def _row(name: str, values: Sequence[float], width: int = 11) -> str:
    return f'{name:<30}' + ''.join(f'{value / GIB:>{width}.2f}' for value in values)


def report(cfg: Config, shape: tuple[int, ...], gpus: int, gpu_mem: float, rows: list[Activations]) -> str:
    """Text of the plan: activations, then the total on each GPU for every way to save memory."""
    counts = count(cfg)
    stages = [f'stage {i + 1}' for i in range(len(rows[0].backbone.kept) - 1)]
    precision = 'bfloat16' if is_bfloat16(cfg) else 'float32'
    lines = [
        f'{cfg.train_dataloader.batch_size} x {_join(shape)} on each of {gpus} GPUs of {gpu_mem:g} GiB, {precision}; '
        f'{counts.parameters / FLOAT32 / 1e6:.1f} M parameters, {counts.trained / FLOAT32 / 1e6:.1f} M trained.',
        'All figures in GiB, on each GPU; < marks what the config has, + what fits.',
        '',
        f'{"Activations kept":<30}'
        + ''.join(f'{name:>11}' for name in ('patches', *stages, 'heads', 'backward', 'peak')),
    ]
    for row in rows:
        values = [*row.backbone.kept, row.heads, row.backbone.backward_peak, row.peak]
        lines.append(_row(row.name, values) + ' <' * row.is_config)
    columns = ('parameters', 'gradients', 'optimizer', 'others', 'state')
    lines += ['', f'{"Held during the whole step":<30}' + ''.join(f'{name:>11}' for name in columns)]
    held = states(counts, gpus)
    for s in held:
        values = (s.parameters, s.gradients, s.optimizer, s.others, s.total)
        lines.append(_row(s.name, values) + ' <' * (s.name == own_state(cfg)))
    lines += ['', f'{"Total":<30}' + ''.join(f'{s.name:>11}' for s in held)]
    for row in rows:
        totals = [s.total + row.peak + CONTEXT for s in held]
        cells = [f'{total / GIB:>9.2f}{" +" if total <= gpu_mem * GIB else "  "}' for total in totals]
        lines.append(f'{row.name:<30}' + ''.join(cells) + ' <' * row.is_config)
    return '\n'.join([*lines, '', *_notes(cfg, counts)])


def _notes(cfg: Config, counts: Counts) -> list[str]:
    notes = [
        'Heads: neck and heads, forward and backward, on top of what the backbone keeps. Backward: of the backbone.',
        'Others: buckets of DDP; bucket and second copy of DeepSpeed; what FSDP gathers; the copy of an EMAHook.'
        + ' There is one.' * bool(counts.ema),
        f'The total has {CONTEXT / GIB:g} GiB for CUDA and NCCL, which is assumed. Not counted: workspaces of kernels, '
        'fragmentation.',
    ]
    if cfg.default_scope == 'mmdet':
        notes.append(f'Heads have {OBJECTS} objects in each image.')
    if cfg.train_dataloader.batch_size > MOST_SAMPLES:
        notes.append(f'Heads of more than {MOST_SAMPLES} samples are extrapolated.')
    return notes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('--gpus', type=int, default=8, help='number of GPUs (default: 8)')
    parser.add_argument('--gpu-mem', type=float, default=40, help='memory of a GPU in GiB (default: 40)')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='size of a sample: one side of a square, H W, or for video T H W (default: what the config trains at)',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='change the config: key=value')
    return parser.parse_args(argv)


def check(args: argparse.Namespace, cfg: Config) -> tuple[int, ...]:
    """Find what would fail later; returns the shape of a sample.

    Raises:
        ValueError: An argument cannot be, or the config is none that this script plans.
    """
    if args.gpus < 1:
        raise ValueError(f'--gpus must be at least 1, got {args.gpus}')
    if args.gpu_mem <= 0:
        raise ValueError(f'--gpu-mem must be more than 0, got {args.gpu_mem:g}')
    shape = training_shape(cfg, args.shape)
    backbone = cfg.model.get('backbone', {}).get('type')
    if not str(backbone).startswith('swinv2_mm.'):
        raise ValueError(f'model.backbone.type must be a backbone of swinv2_mm, got {backbone!r}')
    classes.check_classes(cfg, parts=['model'])
    _numbers_of_state(cfg)
    return shape


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with launch.one_line_errors(FileNotFoundError, ModuleNotFoundError, ValueError):
        cfg = launch.load_config(args.config, args.cfg_options)
        shape = check(args, cfg)
    print(report(cfg, shape, args.gpus, args.gpu_mem, activations(cfg, shape)))


if __name__ == '__main__':
    main()
