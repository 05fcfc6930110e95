"""Public Swin V2 implementations beside ours: how each is built, called, and compared with ours.

timm, transformers and torchvision are optional, see requirements/peers.txt.
"""

import functools
import importlib
import logging
import math
from collections.abc import Callable
from types import ModuleType

import peer_packages
import torch
import torch.nn.functional as F
from side_by_side import DEVICE, Contender, Family, NotPossibleError, Shape, randomize
from torch import Tensor, nn

from swinv2_mm.models import SwinTransformer3DV2, SwinTransformerV2
from swinv2_mm.models.attention import WindowAttention
from swinv2_mm.ops.window_attention import BACKENDS

# ---------------------------------------------------------------- finding them


@functools.cache
def find(module: str) -> ModuleType:
    """Import a module of a peer.

    Raises:
        NotPossibleError: It is not installed.
    """
    peer_packages.add_to_path()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise NotPossibleError(
            f'not possible: {error.name} is not installed; see requirements/peers.txt, or run make setup'
        ) from error


def images_alone(shape: Shape) -> None:
    """Refuse what no peer computes as we do.

    Raises:
        NotPossibleError: The shape has an axis for time, or is padded.
    """
    if len(shape.size) != 2:
        raise NotPossibleError('not possible: it takes images alone')
    if shape.is_padded():
        raise NotPossibleError('not possible: its tokens attend to padding, which gives other features')


# ---------------------------------------------------------------- ours


def our_backbone(shape: Shape, backend: str = 'auto', **kwargs) -> nn.Module:
    """Our backbone for a shape, with the last stage's features as output."""
    stages = range(len(shape.depths))
    kind = SwinTransformerV2 if len(shape.size) == 2 else SwinTransformer3DV2
    return kind(
        shape.arch,
        window_size=[shape.window] * len(stages),
        pretrained_window_sizes=[shape.window_of(i) for i in stages],  # what the peers take, who are not told any
        patch_size=shape.patch,
        drop_path_rate=0.0,
        out_indices=(stages[-1],),
        attention_backend=backend,
        **kwargs,
    )


def our_features(model: nn.Module, x: Tensor) -> Tensor:
    """(B, 3, *size) -> (B, *S, C)."""
    features = model(x)
    return (features[0] if isinstance(features, tuple) else features).movedim(1, -1)


def reference_backbone(shape: Shape, model: nn.Module) -> nn.Module:
    """Ours on the reference backend in float64 with a model's weights, and with little memory, at the price of time."""
    stages = tuple(range(len(shape.depths)))
    reference = our_backbone(shape, 'reference', with_cp=True, sequential_stages=stages)
    logging.disable(logging.INFO)  # it is loaded for each family: not worth a line
    reference.load_state_dict(model.state_dict())
    logging.disable(logging.NOTSET)
    return reference.double()


def our_attention(shape: Shape, stage: int, backend: str = 'auto', sequential: bool = False) -> nn.Module:
    """Attention half of a block of ours, with shifted windows where the map has more than one."""
    return WindowAttention(
        shape.dim(stage),
        num_heads=shape.arch['num_heads'][stage],
        window_size=shape.window,
        shift_size=tuple(w // 2 for w in shape.window),
        pretrained_window_size=shape.window_of(stage),
        backend=backend,
        sequential=sequential,
    )


def reference_attention(shape: Shape, stage: int, model: nn.Module) -> nn.Module:
    """The same as `reference_backbone` for `our_attention`, from weights of ours, timm or torchvision."""
    reference = our_attention(shape, stage, 'reference', sequential=True)
    weights = {name.removeprefix('attn.'): value for name, value in model.state_dict().items()}
    if 'qkv.bias' in weights:  # torchvision's; the part of the keys is not used
        weights['q_bias'], _, weights['v_bias'] = weights['qkv.bias'].chunk(3)
    reference.load_state_dict(dict(reference.state_dict(), **{n: weights[n] for n, _ in reference.named_parameters()}))
    return reference.double()


def use_backend(backend: str, dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """A function that lets our model attend with a backend; it raises `NotPossibleError` if that cannot run."""

    def prepare(model: nn.Module) -> None:
        reason = BACKENDS[backend].can_run(torch.empty(1, 1, 1, 3, 1, 32, device=DEVICE, dtype=dtype))
        if reason:
            raise NotPossibleError(f'not possible: {reason}')
        for module in model.modules():
            if isinstance(module, WindowAttention):
                module.backend = backend

    return prepare


# ---------------------------------------------------------------- timm


def timm_backbone(shape: Shape) -> nn.Module:
    """The model of timm without its classifier."""
    images_alone(shape)
    return find('timm.models.swin_transformer_v2').SwinTransformerV2(
        img_size=shape.size,
        window_size=shape.window[0],
        num_classes=0,
        embed_dim=shape.arch['embed_dims'],
        depths=shape.depths,
        num_heads=shape.arch['num_heads'],
        drop_path_rate=0.0,
    )


class TimmAttention(nn.Module):
    """The attention half of timm's block.

    Args:
        block: timm's block, whose `attn` it takes.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        block.norm1 = block.norm2 = block.mlp = nn.Identity()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.block._attn(x)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Weights under the names of ours."""
        return self.block.attn.state_dict(*args, **kwargs)


def timm_attention(shape: Shape, stage: int) -> nn.Module:
    """The same as `our_attention`."""
    images_alone(shape)
    block = find('timm.models.swin_transformer_v2').SwinTransformerV2Block(
        shape.dim(stage),
        shape.map_size(stage),
        shape.arch['num_heads'][stage],
        window_size=shape.window,
        shift_size=tuple(w // 2 for w in shape.window),
    )
    return TimmAttention(block)


def use_sdpa(model: nn.Module) -> None:
    """Let timm's attention use PyTorch's fused kernels: what anyone would change first, and the peer to beat."""
    module = find('timm.models.swin_transformer_v2')
    for attention in model.modules():
        if type(attention) is module.WindowAttention:
            attention.__class__ = _sdpa_class()
            attention.kept = None


@functools.cache
def _sdpa_class() -> type[nn.Module]:
    class SdpaWindowAttention(find('timm.models.swin_transformer_v2').WindowAttention):
        """timm's attention by `F.scaled_dot_product_attention`; in eval mode its position bias is computed once."""

        def train(self, mode: bool = True) -> nn.Module:
            self.kept = None
            super().train(mode)
            if not mode:
                with torch.no_grad():
                    self.kept = self.bias()
            return self

        def bias(self) -> Tensor:
            table = 16 * self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads).sigmoid()
            tokens = math.prod(self.window_size)
            return table[self.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            count, tokens, dim = x.shape
            qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
            q, k, v = qkv.reshape(count, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=math.log(100)).exp()
            q, k = q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
            bias = (self.bias() if self.kept is None else self.kept).to(v.dtype)
            if mask is not None:  # windows become heads, so that the mask need not be repeated for each image
                bias = (bias + mask[:, None].to(v.dtype)).flatten(0, 1)
                q, k, v = (t.reshape(-1, len(bias), tokens, t.shape[-1]) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=1.0)
            out = out.reshape(count, self.num_heads, tokens, -1)
            return self.proj(out.transpose(1, 2).reshape(count, tokens, dim))

    return SdpaWindowAttention


# ---------------------------------------------------------------- transformers and torchvision


def transformers_backbone(shape: Shape) -> nn.Module:
    """The model of transformers, without pooling."""
    images_alone(shape)
    transformers = find('transformers')
    config = transformers.Swinv2Config(
        image_size=shape.size[0],
        window_size=shape.window[0],
        embed_dim=shape.arch['embed_dims'],
        depths=list(shape.depths),
        num_heads=list(shape.arch['num_heads']),
        drop_path_rate=0.0,
    )
    return transformers.Swinv2Model(config, add_pooling_layer=False)


def torchvision_backbone(shape: Shape) -> nn.Module:
    """The model of torchvision without its classifier."""
    images_alone(shape)
    _same_window_everywhere(shape, range(len(shape.depths)))
    peer = find('torchvision.models.swin_transformer')
    model = peer.SwinTransformer(
        [4, 4],
        shape.arch['embed_dims'],
        shape.depths,
        shape.arch['num_heads'],
        list(shape.window),
        stochastic_depth_prob=0.0,
        block=peer.SwinTransformerBlockV2,
        downsample_layer=peer.PatchMergingV2,
    )
    model.head = nn.Identity()
    return model


def torchvision_attention(shape: Shape, stage: int) -> nn.Module:
    """The same as `our_attention`."""
    images_alone(shape)
    _same_window_everywhere(shape, [stage])
    attention = find('torchvision.models.swin_transformer').ShiftedWindowAttentionV2
    window, shift = list(shape.window), [w // 2 for w in shape.window]
    return attention(shape.dim(stage), window, shift, shape.arch['num_heads'][stage])


def _same_window_everywhere(shape: Shape, stages: list[int] | range) -> None:
    if any(shape.window_of(i) != shape.window for i in stages):
        raise NotPossibleError('not possible: it pads maps that are smaller than the window, and attends to that')


# ---------------------------------------------------------------- families and contenders


def backbone_families(shape: Shape) -> dict[str, Family]:
    """Ours and the peers, for whole backbones."""
    compare = dict(reference=functools.partial(reference_backbone, shape), reference_features=our_features)

    def family(build: Callable[[Shape], nn.Module], features: Callable, **names) -> Family:
        return Family(lambda: randomize(build(shape)), features, **compare, **names)

    hf = 'encoder.layers.0.blocks.0.attention.self'
    return {
        'ours': family(our_backbone, our_features),
        'timm': family(timm_backbone, lambda model, x: model.forward_features(x)),
        'transformers': family(
            transformers_backbone,
            lambda model, x: model(x).last_hidden_state,
            qkv=tuple(f'{hf}.{part}.weight' for part in ('query', 'key', 'value')),
            cpb=f'{hf}.continuous_position_bias_mlp.0.weight',
        ),
        'torchvision': family(
            torchvision_backbone,
            lambda model, x: model.norm(model.features(x)),
            qkv=('features.1.0.attn.qkv.weight',),
            cpb='features.1.0.attn.cpb_mlp.0.weight',
        ),
    }


def attention_families(shape: Shape, stage: int) -> dict[str, Family]:
    """Ours and the peers, for the attention half of a block. That of transformers is no module of its own."""
    builds = dict(ours=our_attention, timm=timm_attention, torchvision=torchvision_attention)
    prefix = dict(ours='', timm='block.attn.', torchvision='')
    call = lambda model, x: model(x)  # noqa: E731
    return {
        name: Family(
            lambda build=build: randomize(build(shape, stage)),
            call,
            functools.partial(reference_attention, shape, stage),
            call,
            qkv=(f'{prefix[name]}qkv.weight',),
            cpb=f'{prefix[name]}cpb_mlp.0.weight',
        )
        for name, build in builds.items()
    }


def contenders(dtype: torch.dtype, peers: tuple[str, ...]) -> list[Contender]:
    """Each backend of ours, timm as it is and with fused kernels, and further peers as they are."""
    ours = [
        Contender(f'ours {name}', 'ours', use_backend(name, dtype), dense=(name == 'reference',) * 2)
        for name in BACKENDS
    ]
    timm = [Contender('timm', 'timm'), Contender('timm sdpa', 'timm', use_sdpa, dense=(False, True))]
    others = [Contender(f'{name} eager', name) for name in peers]
    return [c for base in (*timm, *ours) for c in base.eager_and_compiled()] + others
