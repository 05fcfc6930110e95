"""The implementations that are compared: the backends of this package, timm, transformers and torchvision."""

import functools
import math
import re
from collections.abc import Callable

import ours
import peers
import torch
from cases import Family, Implementation
from shapes import Shape
from torch import nn

from swinv2_mm.ops.window_attention import BACKENDS


def backbone_families(shape: Shape) -> dict[str, Family]:
    """Families of whole backbones."""
    compare = dict(reference=functools.partial(ours.build_reference_backbone, shape), reference_features=ours.features)

    def family(build: Callable[[Shape], nn.Module], features: Callable, **names) -> Family:
        return Family(lambda: randomize(build(shape)), features, **compare, **names)

    hf = 'encoder.layers.0.blocks.0.attention.self'
    return {
        'ours': family(ours.build_backbone, ours.features),
        'timm': family(peers.build_timm_backbone, lambda model, x: model.forward_features(x)),
        'transformers': family(
            peers.build_transformers_backbone,
            lambda model, x: model(x).last_hidden_state,
            qkv=tuple(f'{hf}.{part}.weight' for part in ('query', 'key', 'value')),
            cpb=f'{hf}.continuous_position_bias_mlp.0.weight',
        ),
        'torchvision': family(
            peers.build_torchvision_backbone,
            lambda model, x: model.norm(model.features(x)),
            qkv=('features.1.0.attn.qkv.weight',),
            cpb='features.1.0.attn.cpb_mlp.0.weight',
        ),
    }


def attention_families(shape: Shape, stage: int) -> dict[str, Family]:
    """Families of the attention half of a block, which in transformers is not a module of its own."""
    builds = dict(
        ours=ours.build_attention, timm=peers.build_timm_attention, torchvision=peers.build_torchvision_attention
    )
    prefix = dict(ours='', timm='block.attn.', torchvision='')
    call = lambda model, x: model(x)  # noqa: E731
    return {
        name: Family(
            lambda build=build: randomize(build(shape, stage)),
            call,
            functools.partial(ours.build_reference_attention, shape, stage),
            call,
            qkv=(f'{prefix[name]}qkv.weight',),
            cpb=f'{prefix[name]}cpb_mlp.0.weight',
        )
        for name, build in builds.items()
    }


def all_implementations(dtype: torch.dtype, other_peers: tuple[str, ...]) -> list[Implementation]:
    """Timm as it is and with SDPA and each backend of this package, eager and compiled; other peers as they are."""
    found = [
        Implementation('timm', 'timm'),
        Implementation('timm sdpa', 'timm', peers.use_sdpa, dense=(False, True)),
        *(
            Implementation(f'ours {name}', 'ours', ours.use_backend(name, dtype), dense=(name == 'reference',) * 2)
            for name in BACKENDS
        ),
    ]
    others = [Implementation(f'{name} eager', name) for name in other_peers]
    return [variant for base in found for variant in base.eager_and_compiled()] + others


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomize what initialisation makes trivial, by the names in all peers: norms, position biases, scales."""
    generator = torch.Generator().manual_seed(seed)
    ranges = (
        (r'norm.*weight$', 0.5, 1.0),
        (r'norm.*bias$', -0.1, 0.1),
        (r'logit_scale$', math.log(5), math.log(30)),
        (r'(cpb_mlp|position_bias_mlp)', -0.3, 0.3),
        (r'(q_bias|v_bias|qkv\.bias|query\.bias|value\.bias)$', -0.1, 0.1),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for pattern, low, high in ranges:
                if re.search(pattern, name):
                    parameter.uniform_(low, high, generator=generator)
                    break
    return model
