"""Layouts (sets of keys) of public Swin V2 checkpoints: how to recognise each and convert it to that of this package.

Ours is the official layout, except for the final norm, which is the output norm of the last stage (`norm{i}`). A layout
is a table of renames, applied in order, and functions for what renaming cannot do. Tables follow the published files.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import CheckpointError

Weights = dict[str, Tensor]


def official_final_norm(weights: Weights) -> Weights:
    """Rename the final norm to the output norm of the last stage, unless the file has output norms."""
    last = f'norm{num_stages(weights) - 1}.'
    if any(name.startswith(last) for name in weights):
        return weights
    return {re.sub(r'^norm\.', last, name): value for name, value in weights.items()}


def merge_at_end_of_stage(weights: Weights) -> Weights:
    """Move the merging that timm and mmpretrain keep at the start of a stage to the end of the one before.

    Old files of timm already have it at the end: those in which the first stage has one.
    """
    if any(name.startswith('layers.0.downsample.') for name in weights):
        return weights
    pattern = re.compile(r'^layers\.(\d+)\.downsample\.')
    return {
        pattern.sub(lambda match: f'layers.{int(match[1]) - 1}.downsample.', name): value
        for name, value in weights.items()
    }


def order_merged_columns(weights: Weights) -> Weights:
    """Reorder the input columns of mmpretrain's merging, those of `nn.Unfold`: channels first, rows before columns."""

    def reorder(name: str, value: Tensor) -> Tensor:
        if not name.endswith('downsample.reduction.weight') or value.dim() != 2 or value.shape[1] % 4:
            return value
        return value.unflatten(1, (-1, 4)).transpose(1, 2)[:, [0, 2, 1, 3]].flatten(1)

    return {name: reorder(name, value) for name, value in weights.items()}


def join_query_key_value(weights: Weights) -> Weights:
    """Join the three projections of transformers, block by block, and free the parts of each."""
    for name in [name for name in weights if name.endswith('attn.query.weight')]:
        parts = [name.replace('query', part) for part in ('query', 'key', 'value')]
        if all(part in weights for part in parts):
            weights[name.replace('query', 'qkv')] = torch.cat([weights.pop(part) for part in parts])
    return weights


def split_qkv_bias(weights: Weights) -> Weights:
    """Split torchvision's bias of all three projections; that of the keys is unused in torchvision too."""
    split = {}
    for name, value in weights.items():
        if name.endswith('attn.qkv.bias') and value.dim() == 1 and len(value) % 3 == 0:
            query, _, values = value.chunk(3)
            split[name.replace('qkv.bias', 'q_bias')] = query
            split[name.replace('qkv.bias', 'v_bias')] = values
        else:
            split[name] = value
    return split


@dataclass(frozen=True)
class Layout:
    """A set of keys for the weights of Swin V2.

    Args:
        name: Code that writes it.
        marker: Regular expression of keys that only this layout has; what precedes them is the prefix of the backbone.
        renames: Pairs of a regular expression and what replaces it.
        steps: Functions that follow the renaming.
    """

    name: str
    marker: str
    renames: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = ()
    steps: tuple[Callable[[Weights], Weights], ...] = field(default=(official_final_norm,))


# `rpe_mlp` is the older name, in SimMIM's files and in MSRA's dense code; timm and our own files have this layout too
OFFICIAL = Layout(
    'official, timm or swinv2_mm',
    r'layers\.\d+\.blocks\.\d+\.attn\.(?:cpb|rpe)_mlp\.0\.weight',
    renames=((r'\.rpe_mlp\.', '.cpb_mlp.'),),
    steps=(merge_at_end_of_stage, official_final_norm),
)
TRANSFORMERS = Layout(
    'transformers',
    r'encoder\.layers\.\d+\.blocks\.\d+\.attention\.self\.continuous_position_bias_mlp\.0\.weight',
    renames=(
        (r'^embeddings\.patch_embeddings\.projection\.', 'patch_embed.proj.'),
        (r'^embeddings\.norm\.', 'patch_embed.norm.'),
        (r'^embeddings\.mask_token$', 'mask_token'),
        (r'^encoder\.', ''),
        (r'^layernorm\.', 'norm.'),
        (r'\.attention\.self\.continuous_position_bias_mlp\.', '.attn.cpb_mlp.'),
        (r'\.attention\.self\.(query|value)\.bias$', lambda match: f'.attn.{match[1][0]}_bias'),
        (r'\.attention\.self\.', '.attn.'),
        (r'\.attention\.output\.dense\.', '.attn.proj.'),
        (r'\.layernorm_before\.', '.norm1.'),
        (r'\.layernorm_after\.', '.norm2.'),
        (r'\.intermediate\.dense\.', '.mlp.fc1.'),
        (r'\.output\.dense\.', '.mlp.fc2.'),
    ),
    steps=(join_query_key_value, official_final_norm),
)
TORCHVISION = Layout(
    'torchvision',
    r'features\.\d+\.\d+\.attn\.cpb_mlp\.0\.weight',
    renames=(
        (r'^features\.0\.0\.', 'patch_embed.proj.'),
        (r'^features\.0\.2\.', 'patch_embed.norm.'),
        (r'^features\.(\d*[13579])\.(\d+)\.', lambda match: f'layers.{int(match[1]) // 2}.blocks.{match[2]}.'),
        (r'^features\.(\d*[02468])\.', lambda match: f'layers.{int(match[1]) // 2 - 1}.downsample.'),
        (r'\.mlp\.0\.', '.mlp.fc1.'),
        (r'\.mlp\.3\.', '.mlp.fc2.'),
    ),
    steps=(split_qkv_bias, official_final_norm),
)
MMPRETRAIN = Layout(
    'mmpretrain',
    r'stages\.\d+\.blocks\.\d+\.attn\.w_msa\.cpb_mlp\.0\.weight',
    renames=(
        (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
        (r'^(stages\.\d+\.blocks\.\d+)\.norm3\.', r'\1.enorm.'),
        (r'^stages\.', 'layers.'),
        (r'\.attn\.w_msa\.', '.attn.'),
        (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
        (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
    ),
    steps=(merge_at_end_of_stage, order_merged_columns),
)
LAYOUTS = (OFFICIAL, TRANSFORMERS, TORCHVISION, MMPRETRAIN)

PATCH_KERNEL = 'patch_embed.proj.weight'  # (C, channels, *patch): its axes are those of the model
# buffers that depend on the input size; the tables of coordinates are read before they are dropped
COORDS_TABLE = 'attn.relative_coords_table'
BUFFERS = re.compile(r'\.attn_mask$|\.attn\.(relative_coords_table|relative_position_index|k_bias)$')
# parts of classifiers and of masked-image models with the same prefix as the backbone
OTHER_HEADS = re.compile(r'^(head|classifier|decoder|mask_token|projector|pre_logits)(\.|$)')

CLASSIFIER_PREFIX = 'head.fc.'  # of the linear classifier in mmpretrain's LinearClsHead


def has_log_cpb(names: Collection[str]) -> bool:
    """Whether any key belongs to a Log-CPB: then the state dict is that of a Swin V2, complete or not."""
    markers = re.compile(r'\b(cpb_mlp|rpe_mlp|continuous_position_bias_mlp|relative_coords_table)\b')
    return any(markers.search(name) for name in names)


def find_backbones(names: Collection[str]) -> list[tuple[Layout, str]]:
    """Recognise every Swin V2 in a state dict: its layout and its prefix."""
    found = []
    for layout in LAYOUTS:
        matches = (re.fullmatch(rf'((?:.*\.)?){layout.marker}', name) for name in names)
        found += [(layout, prefix) for prefix in dict.fromkeys(match[1] or '' for match in matches if match)]
    return found


def find_backbone(names: list[str]) -> tuple[Layout, str]:
    """Recognise the layout of a state dict, and the prefix of its backbone, or of the one without a prefix.

    Raises:
        CheckpointError: There is no Swin V2, or there are several with prefixes.
    """
    found = find_backbones(names)
    without_prefix = [(layout, prefix) for layout, prefix in found if not prefix]
    if len(found) == 1 or len(without_prefix) == 1:
        return (without_prefix or found)[0]
    if found:
        prefixes = ', '.join(repr(prefix) for _, prefix in found)
        raise CheckpointError(f'it contains several Swin V2 backbones, under {prefixes}; give the `prefix` of one')
    sample = ', '.join(names[:4])
    hint = ''
    if any('relative_position_bias_table' in name for name in names):
        hint = '; it looks like Swin V1, whose position bias and norms differ'
    raise CheckpointError(
        f'it contains no Swin V2 of a known layout{hint}. It has {len(names)} entries'
        + (f', such as {sample}' if sample else '')
    )


def pop_classifier(state_dict: Weights, prefix: str) -> Weights:
    """Remove the linear classifier of a file from its entries, and return it with the names of mmpretrain's.

    It is `head` in the official code, torchvision and old timm, `head.fc` in timm. In transformers it is `classifier`,
    next to the backbone `swinv2`.
    """
    for name in (f'{prefix}head.fc', f'{prefix}head', f'{prefix.removesuffix("swinv2.")}classifier'):
        weight = state_dict.get(f'{name}.weight')
        if isinstance(weight, Tensor) and weight.dim() == 2:  # not the convolution of a segmentation head
            kinds = (kind for kind in ('weight', 'bias') if f'{name}.{kind}' in state_dict)
            return {CLASSIFIER_PREFIX + kind: state_dict.pop(f'{name}.{kind}') for kind in kinds}
    return {}


def convert_keys(weights: Weights, layout: Layout) -> Weights:
    """Convert the keys of a backbone, without their prefix, from a layout to ours; buffers are kept.

    `weights` is emptied, so that replaced tensors do not stay in memory.

    Raises:
        CheckpointError: Two entries get the same name.
    """
    renamed: Weights = {}
    origin: dict[str, str] = {}
    for original in list(weights):
        name = original
        for pattern, replacement in layout.renames:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise CheckpointError(f'{origin[name]} and {original} are the same parameter')
        renamed[name], origin[name] = weights.pop(original), original
    for step in layout.steps:
        renamed = step(renamed)
    return renamed


def num_stages(weights: Collection[str]) -> int:
    """Number of stages, from names in our layout."""
    stages = (int(match[1]) for match in map(re.compile(r'layers\.(\d+)\.').match, weights) if match)
    return 1 + max(stages, default=-1)


def depths(weights: Collection[str]) -> list[int]:
    """Number of blocks of each stage, from names in our layout."""
    blocks = {match.groups() for match in map(re.compile(r'layers\.(\d+)\.blocks\.(\d+)\.').match, weights) if match}
    return [1 + max((int(j) for i, j in blocks if int(i) == stage), default=-1) for stage in range(num_stages(weights))]


LAYERS_WITH_BIAS = ('attn.proj', 'norm1', 'norm2', 'mlp.fc1', 'mlp.fc2')
BLOCK_KEYS = (
    *(f'attn.{name}' for name in ('logit_scale', 'q_bias', 'v_bias', 'qkv.weight')),
    *(f'attn.cpb_mlp.{name}' for name in ('0.weight', '0.bias', '2.weight')),
    *(f'{module}.{kind}' for module in LAYERS_WITH_BIAS for kind in ('weight', 'bias')),
)


def required_keys(weights: Collection[str]) -> list[str]:
    """Keys in our layout that a backbone with these stages and blocks must have."""
    blocks = [f'layers.{i}.blocks.{j}' for i, depth in enumerate(depths(weights)) for j in range(depth)]
    merging = ('reduction.weight', 'norm.weight', 'norm.bias')
    return [
        *(f'patch_embed.{part}.{kind}' for part in ('proj', 'norm') for kind in ('weight', 'bias')),
        *(f'{block}.{name}' for block in blocks for name in BLOCK_KEYS),
        *(f'layers.{i}.downsample.{name}' for i in range(num_stages(weights) - 1) for name in merging),
    ]


def describe_arch(shapes: Mapping[str, Sequence[int]]) -> str:
    """Architecture of weights in our layout, by their shapes, for messages."""

    def first_axis(name: str) -> int | str:
        return next(iter(shapes.get(name, ())), '?')

    heads = tuple(first_axis(f'layers.{i}.blocks.0.attn.logit_scale') for i in range(num_stages(shapes)))
    extra = sum(name.endswith('.enorm.weight') for name in shapes)
    return f'embed_dims={first_axis("patch_embed.norm.weight")}, depths={tuple(depths(shapes))}, num_heads={heads}' + (
        f' and {extra} extra norms' if extra else ''
    )
