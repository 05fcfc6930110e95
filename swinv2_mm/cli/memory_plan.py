"""Memory that training a config takes on each GPU, estimated without a GPU and without data.

Parameters are counted on a model on the meta device. Activations are counted by running a training step: the backbone
on fake tensors (`memory.py`); neck and heads on real ones, because what they compute depends on data, with their
convolutions and matrix products skipped. Neck and heads get random features and as many objects as a crowded image has.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from swinv2_mm.cli.inputs import join_numbers, random_batch
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

GIB = 2**30
FLOAT32 = 4  # bytes; parameters, gradients and optimizer state are in float32, autocast makes its copies of them
OPTIMIZERS = {'Adam': 2, 'AdamW': 2}  # values that the state has per parameter
DEEPSPEED_BUCKET = 500_000_000 * FLOAT32  # the default size, independent of the model
CUDA_CONTEXT = 1.5 * GIB  # with its libraries and NCCL; assumed
MAX_HEAD_SAMPLES = 3  # larger batches are extrapolated
SEQUENTIAL = (0, 1)  # stages with sequential attention (Sec. 3.4) if the config names none


# ---------------------------------------------------------------- model states


@dataclass
class ModelSize:
    """Size of a model in float32, in bytes.

    Attributes:
        parameters: Parameters and buffers.
        trained: Trained parameters.
        largest_block: Trained parameters of the largest block of the backbone, which FSDP gathers as one unit.
        rest: Trained parameters outside of blocks.
        ema: Copy of all parameters and buffers that an EMAHook keeps, or 0.
        optimizer: Optimizer state.
    """

    parameters: int
    trained: int
    largest_block: int
    rest: int
    ema: int
    optimizer: int


@dataclass
class ModelStates:
    """Memory of the model states on each GPU under one distribution strategy, in bytes; constant during a step.

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


def model_size(cfg: Config) -> ModelSize:
    """Count the parameters of a config's model on the meta device."""
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    trained = _trained(model)
    blocks = [_trained(module) for module in model.modules() if isinstance(module, SwinBlock)]
    parameters = sum(x.numel() for x in (*model.parameters(), *model.buffers())) * FLOAT32
    has_ema = any(str(hook.get('type')).endswith('EMAHook') for hook in cfg.get('custom_hooks') or ())
    return ModelSize(
        parameters=parameters,
        trained=trained,
        largest_block=max(blocks),
        rest=trained - sum(blocks),
        ema=parameters if has_ema else 0,
        optimizer=optimizer_slots(cfg) * trained,
    )


def optimizer_slots(cfg: Config) -> int:
    """Number of values that the optimizer stores per trained parameter.

    Raises:
        ValueError: It is not one of `OPTIMIZERS`.
    """
    optimizer = cfg.optim_wrapper.optimizer.type
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f'optim_wrapper.optimizer.type: the state of {optimizer!r} is not known; known are {", ".join(OPTIMIZERS)}'
        )
    return OPTIMIZERS[optimizer]


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad) * FLOAT32


def model_states(model: ModelSize, gpus: int) -> list[ModelStates]:
    """Model states on each of `gpus` GPUs, for each distribution strategy.

    DDP is mmengine's; the others are those of configs/_base_/memory: zero1.py, deepspeed_zero2.py and fsdp.py.
    """
    c = model
    if gpus == 1:
        return [ModelStates('one GPU', c.parameters, c.trained, c.optimizer, c.ema)]
    # parameters and gradients of a block and of the next one, which is prefetched; the rest stays gathered
    gathered = 2 * (2 * c.largest_block + c.rest)
    return [
        ModelStates('DDP', c.parameters, c.trained, c.optimizer, c.trained + c.ema),
        ModelStates('ZeRO-1', c.parameters, c.trained, c.optimizer / gpus, c.ema),
        ModelStates(
            'ZeRO-2', c.parameters, c.trained / gpus, c.optimizer / gpus, c.trained / gpus + DEEPSPEED_BUCKET + c.ema
        ),
        ModelStates('FSDP', c.parameters / gpus, c.trained / gpus, c.optimizer / gpus, gathered + c.ema),
    ]


def configured_strategy(cfg: Config) -> str:
    """Name of the distribution strategy of a config: 'DDP', 'ZeRO-1', 'ZeRO-2' or 'FSDP'."""
    wrapper = str((cfg.get('model_wrapper_cfg') or {}).get('type')).split('.')[-1]
    stage = (cfg.get('strategy') or {}).get('zero_optimization', {}).get('stage')
    of_wrapper = {'ZeroDistributedDataParallel': 'ZeRO-1', 'FullyShardedModel': 'FSDP'}
    return of_wrapper.get(wrapper) or {1: 'ZeRO-1', 2: 'ZeRO-2', 3: 'FSDP'}.get(stage, 'DDP')


# ---------------------------------------------------------------- activations


@dataclass
class Activations:
    """Memory of a step in addition to the model states, with some of the memory-saving techniques, in bytes.

    Attributes:
        name: The techniques.
        backbone: Memory of the backbone.
        heads: Peak of neck and heads, forward and backward, in addition to what the backbone keeps.
        is_config: Whether these are the techniques of the config.
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
    """Whether a config trains with autocast."""
    return str(cfg.optim_wrapper.get('type')).split('.')[-1] == 'AmpOptimWrapper'


def activations(cfg: Config, shape: tuple[int, ...]) -> list[Activations]:
    """Run a training step of a config with and without activation checkpointing.

    With the attention backend 'reference', also with and without sequential attention. The other backends always
    process a few windows at a time.
    """
    samples = cfg.train_dataloader.batch_size
    backbone_cfg = cfg.model.backbone
    cfg_with_cp, cfg_sequential = backbone_cfg.get('with_cp', False), tuple(backbone_cfg.get('sequential_stages', ()))
    is_reference = backbone_cfg.get('attention_backend') == 'reference'
    if not is_reference:
        cfg_sequential = ()
    heads = None
    rows = []
    for with_cp in (False, cfg_with_cp or True):
        for stages in ((), cfg_sequential or SEQUENTIAL) if is_reference else ((),):
            backbone = backbone_memory(cfg, shape, samples, with_cp=with_cp, sequential_stages=stages)
            heads = heads_memory(cfg, shape, samples, backbone.outputs) if heads is None else heads
            names = ['checkpointing'] * bool(with_cp) + [f'sequential {join_numbers(i + 1 for i in stages)}'] * bool(
                stages
            )
            is_config = (with_cp, stages) == (cfg_with_cp, cfg_sequential)
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
    """Peak of neck and heads in a training step in bytes; parameters, gradients and features are not counted.

    Args:
        cfg: The config.
        shape: Shape of a sample.
        samples: Batch size.
        outputs: Outputs of the backbone for them, on the meta device.
    """
    model = _build_heads(cfg, shape)
    few = min(samples, MAX_HEAD_SAMPLES)
    peak = _run_heads(cfg, model, shape, few, outputs, samples)
    if few == samples:
        return peak
    return peak + (samples - few) * (peak - _run_heads(cfg, model, shape, few - 1, outputs, samples))


class _Features(nn.Module):
    """Random features in place of a backbone."""

    features: tuple[Tensor, ...]

    def forward(self, *_: Tensor) -> Tensor | tuple[Tensor, ...]:
        is_tensor = len(self.features) == 1 and self.features[0].dim() == 5  # a single output of the video backbone
        return self.features[0] if is_tensor else self.features


def _build_heads(cfg: Config, shape: tuple[int, ...]) -> nn.Module:
    """Build the model of a config without its backbone, on the CPU."""
    model = copy.deepcopy(cfg.model)
    model.backbone = dict(type='swinv2_mm.SwinTransformerV2')  # replaced below; that of the config may be too large
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
