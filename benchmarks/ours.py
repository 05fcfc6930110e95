"""How this package's backbone and attention are built for a shape: with any backend, and as the float64 reference."""

import logging
from collections.abc import Callable

import torch
from cases import NotSupportedError
from measure import DEVICE
from shapes import Shape
from torch import Tensor, nn

from swinv2_mm.models import SwinTransformer3DV2, SwinTransformerV2
from swinv2_mm.models.attention import WindowAttention
from swinv2_mm.ops.window_attention import BACKENDS


def build_backbone(shape: Shape, backend: str = 'auto', **kwargs) -> nn.Module:
    """The backbone for a shape, with the last stage's features as output."""
    stages = range(len(shape.depths))
    kind = SwinTransformerV2 if len(shape.size) == 2 else SwinTransformer3DV2
    return kind(
        shape.arch,
        window_size=[shape.window] * len(stages),
        pretrained_window_sizes=[shape.effective_window(i) for i in stages],  # the default of the peers
        patch_size=shape.patch,
        drop_path_rate=0.0,
        out_indices=(stages[-1],),
        attention_backend=backend,
        **kwargs,
    )


def features(model: nn.Module, x: Tensor) -> Tensor:
    """(B, 3, *size) -> (B, *S, C)."""
    out = model(x)
    return (out[0] if isinstance(out, tuple) else out).movedim(1, -1)


def build_reference_backbone(shape: Shape, model: nn.Module) -> nn.Module:
    """The backbone with the reference backend in float64 and a model's weights; it saves memory at the cost of time."""
    stages = tuple(range(len(shape.depths)))
    reference = build_backbone(shape, 'reference', with_cp=True, sequential_stages=stages)
    logging.disable(logging.INFO)  # it is loaded for each family
    reference.load_state_dict(model.state_dict())
    logging.disable(logging.NOTSET)
    return reference.double()


def build_attention(shape: Shape, stage: int, backend: str = 'auto', sequential: bool = False) -> nn.Module:
    """The attention half of a block, with shifted windows where the feature map has more than one."""
    return WindowAttention(
        shape.dim(stage),
        num_heads=shape.arch['num_heads'][stage],
        window_size=shape.window,
        shift_size=tuple(w // 2 for w in shape.window),
        pretrained_window_size=shape.effective_window(stage),
        backend=backend,
        sequential=sequential,
    )


def build_reference_attention(shape: Shape, stage: int, model: nn.Module) -> nn.Module:
    """The same for `build_attention`, with the weights of this package, timm or torchvision."""
    reference = build_attention(shape, stage, 'reference', sequential=True)
    weights = {name.removeprefix('attn.'): value for name, value in model.state_dict().items()}
    if 'qkv.bias' in weights:  # torchvision's; its bias of the keys is not used
        weights['q_bias'], _, weights['v_bias'] = weights['qkv.bias'].chunk(3)
    reference.load_state_dict(dict(reference.state_dict(), **{n: weights[n] for n, _ in reference.named_parameters()}))
    return reference.double()


def use_backend(backend: str, dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """A function that sets the attention backend of a model; it raises `NotSupportedError` if that cannot run."""

    def prepare(model: nn.Module) -> None:
        reason = BACKENDS[backend].can_run(torch.empty(1, 1, 1, 3, 1, 32, device=DEVICE, dtype=dtype))
        if reason:
            raise NotSupportedError(f'not supported: {reason}')
        for module in model.modules():
            if isinstance(module, WindowAttention):
                module.backend = backend

    return prepare
