"""Swin V2 of timm and transformers with the weights of our backbone, as independent oracles."""

import peer_packages
import torch
import torch.nn.functional as F
from torch import nn

from swinv2_mm import compat

HF_NAMES = (
    ('patch_embed.proj', 'embeddings.patch_embeddings.projection'),
    ('patch_embed.norm', 'embeddings.norm'),
    ('layers.', 'encoder.layers.'),
    ('attn.proj', 'attention.output.dense'),
    ('attn.cpb_mlp', 'attention.self.continuous_position_bias_mlp'),
    ('attn.', 'attention.self.'),
    ('norm1', 'layernorm_before'),
    ('norm2', 'layernorm_after'),
    ('mlp.fc1', 'intermediate.dense'),
    ('mlp.fc2', 'output.dense'),
)


def find_peers() -> None:
    """Make timm and transformers importable, and keep mmaction and mmpretrain importable."""
    peer_packages.add_to_path()
    compat.stub_vindlu()  # mmaction and mmpretrain import more when they find transformers
    compat.stub_mmpretrain_multimodal()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomize every parameter: norms differ from 0 and 1, and some scales exceed their clamp."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator).to(like) * (high - low) + low

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith('logit_scale'):
                p.copy_(uniform(p, 1.5, 5.5))  # ln 100 = 4.6
            elif 'norm' in name:
                p.copy_(uniform(p, 0.5, 1.0))
            elif 'cpb_mlp' in name:
                p.copy_(uniform(p, -0.4, 0.4))
            else:
                p.copy_(uniform(p, -0.3, 0.3))
    return model


def apply_output_norm(backbone: nn.Module, stage: int, x_nchw: torch.Tensor) -> torch.Tensor:
    """Apply our output norm to features of an oracle, which has no such norm."""
    norm = getattr(backbone, f'norm{stage}')
    x = F.layer_norm(x_nchw.permute(0, 2, 3, 1), norm.normalized_shape, norm.weight, norm.bias, 1e-5)
    return x.permute(0, 3, 1, 2)


def timm_name(name: str) -> str:
    parts = name.split('.')
    if parts[0] == 'layers' and parts[2] == 'downsample':  # timm merges at the start of the next stage
        parts[1] = str(int(parts[1]) + 1)
    return '.'.join(parts)


def timm_twin(
    backbone: nn.Module,
    image_size: tuple[int, int],
    arch: dict,
    window_size: int,
    pretrained_window_sizes: tuple[int, ...],
) -> nn.Module:
    find_peers()
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    twin = SwinTransformerV2(
        img_size=image_size,
        window_size=window_size,
        pretrained_window_sizes=pretrained_window_sizes,
        num_classes=0,
        embed_dim=arch['embed_dims'],
        depths=arch['depths'],
        num_heads=arch['num_heads'],
        drop_path_rate=0.0,
    )
    dtype = next(backbone.parameters()).dtype
    weights = {timm_name(k): v for k, v in backbone.named_parameters() if not k.startswith('norm')}
    missing, unexpected = twin.to(dtype).load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {'norm.weight', 'norm.bias'}
    return twin


def timm_features(twin: nn.Module, backbone: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    features = twin.forward_intermediates(x, intermediates_only=True, norm=False, output_fmt='NCHW')
    return [apply_output_norm(backbone, i, f) for i, f in enumerate(features)]


def hf_names(name: str) -> str:
    for ours, theirs in HF_NAMES:
        if ours in name:
            name = name.replace(ours, theirs, 1)
    return name


def hf_weights(backbone: nn.Module) -> dict[str, torch.Tensor]:
    weights = {}
    for name, value in backbone.named_parameters():
        if name.startswith('norm'):
            continue
        theirs = hf_names(name)
        if name.endswith('attn.qkv.weight'):
            for part, chunk in zip(('query', 'key', 'value'), value.chunk(3), strict=True):
                weights[theirs.replace('qkv', part)] = chunk
        else:
            weights[theirs.replace('q_bias', 'query.bias').replace('v_bias', 'value.bias')] = value
    return weights


def hf_twin(
    backbone: nn.Module, image_size: int, arch: dict, window_size: int, pretrained_window_sizes: tuple[int, ...]
) -> nn.Module:
    find_peers()
    from transformers import Swinv2Backbone, Swinv2Config

    config = Swinv2Config(
        image_size=image_size,
        window_size=window_size,
        pretrained_window_sizes=pretrained_window_sizes,
        embed_dim=arch['embed_dims'],
        depths=list(arch['depths']),
        num_heads=list(arch['num_heads']),
        drop_path_rate=0.0,
        out_features=['stage1', 'stage2', 'stage3', 'stage4'],
    )
    twin = Swinv2Backbone(config).to(next(backbone.parameters()).dtype).eval()
    missing, unexpected = twin.load_state_dict(hf_weights(backbone), strict=False)
    missing = [m for m in missing if 'relative' not in m and not m.startswith('layernorm')]
    assert (missing, unexpected) == ([], [])
    return twin


def hf_features(twin: nn.Module, backbone: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [apply_output_norm(backbone, i, f) for i, f in enumerate(twin(x).feature_maps)]
