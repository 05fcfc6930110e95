"""Names in the public checkpoints of Swin V2, and how each layout becomes ours.

Ours is the official one, except for the final norm, which is the output norm of the last stage (`norm{i}`). A layout is
a table of renames, applied in order, and functions for what renaming cannot do. Tables follow the published files.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import CheckpointError

Weights = dict[str, Tensor]


def official_final_norm(weights: Weights) -> Weights:
    """Let the final norm be the output norm of the last stage, unless the file has such norms."""
    last = f'norm{num_stages(weights) - 1}.'
    if any(name.startswith(last) for name in weights):
        return weights
    return {re.sub(r'^norm\.', last, name): value for name, value in weights.items()}


def merge_at_end_of_stage(weights: Weights) -> Weights:
    """Move the merging that timm and mmpretrain keep at the start of a stage to the end of the one before.

    Old files of timm keep it at the end, so what counts is whether the first stage has one.
    """
    if any(name.startswith('layers.0.downsample.') for name in weights):
        return weights
    pattern = re.compile(r'^layers\.(\d+)\.downsample\.')
    return {
        pattern.sub(lambda match: f'layers.{int(match[1]) - 1}.downsample.', name): value
        for name, value in weights.items()
    }


def order_merged_columns(weights: Weights) -> Weights:
    """Reorder the inputs of mmpretrain's merging, which come from `nn.Unfold`: channels first, rows before columns."""

    def reorder(name: str, value: Tensor) -> Tensor:
        if not name.endswith('downsample.reduction.weight') or value.dim() != 2 or value.shape[1] % 4:
            return value
        return value.unflatten(1, (-1, 4)).transpose(1, 2)[:, [0, 2, 1, 3]].flatten(1)

    return {name: reorder(name, value) for name, value in weights.items()}


def join_query_key_value(weights: Weights) -> Weights:
    """Join the three projections of transformers; each leaves the memory before the next block's are joined."""
    for name in [name for name in weights if name.endswith('attn.query.weight')]:
        parts = [name.replace('query', part) for part in ('query', 'key', 'value')]
        if all(part in weights for part in parts):
            weights[name.replace('query', 'qkv')] = torch.cat([weights.pop(part) for part in parts])
    return weights


def split_qkv_bias(weights: Weights) -> Weights:
    """Split torchvision's bias of all three projections; the part of the keys is not used by any code."""
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
    """One way to name the weights of Swin V2.

    Args:
        name: Where it comes from.
        marker: Regular expression of names that only this layout has; what stands before them is the backbone's root.
        renames: Pairs of a regular expression and what replaces it.
        steps: What follows the renaming.
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

PATCH = 'patch_embed.proj.weight'  # (C, channels, *patch): its axes are those of the model
# buffers that follow from the input size; the tables of coordinates are read before they are dropped
TABLE = 'attn.relative_coords_table'
BUFFERS = re.compile(r'\.attn_mask$|\.attn\.(relative_coords_table|relative_position_index|k_bias)$')
# parts of classifiers and of masked-image models that lie inside the root of the backbone
OTHER_HEADS = re.compile(r'^(head|classifier|decoder|mask_token|projector|pre_logits)(\.|$)')


def claims_swin_v2(names: Collection[str]) -> bool:
    """Whether a state dict has something of a Log-CPB, and so is that of a Swin V2, damaged or not."""
    marks = re.compile(r'\b(cpb_mlp|rpe_mlp|continuous_position_bias_mlp|relative_coords_table)\b')
    return any(marks.search(name) for name in names)


def find_backbones(names: Collection[str]) -> list[tuple[Layout, str]]:
    """Recognise every Swin V2 in a state dict: its layout, and the prefix under which it lies."""
    found = []
    for layout in LAYOUTS:
        matches = (re.fullmatch(rf'((?:.*\.)?){layout.marker}', name) for name in names)
        found += [(layout, root) for root in dict.fromkeys(match[1] or '' for match in matches if match)]
    return found


def find_backbone(names: list[str]) -> tuple[Layout, str]:
    """Recognise the layout of a state dict, and the prefix under which the backbone lies.

    Raises:
        CheckpointError: There is no Swin V2, or there are several.
    """
    found = find_backbones(names)
    own = [(layout, root) for layout, root in found if not root]
    if len(found) == 1 or len(own) == 1:
        return (own or found)[0]
    if found:
        roots = ', '.join(repr(root) for _, root in found)
        raise CheckpointError(f'it holds several Swin V2 backbones, under {roots}; give the `prefix` of one')
    sample = ', '.join(names[:4])
    hint = ''
    if any('relative_position_bias_table' in name for name in names):
        hint = '; it looks like Swin V1, whose position bias and norms differ'
    raise CheckpointError(
        f'it holds no Swin V2 that this package knows{hint}. It has {len(names)} entries'
        + (f', such as {sample}' if sample else '')
    )


def to_ours(weights: Weights, layout: Layout) -> Weights:
    """Rename a backbone's weights, given without their root, from a layout to ours; buffers are kept.

    Takes the weights out of the dict that it is given, so that what is replaced does not stay in memory.

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


WITH_BIAS = ('attn.proj', 'norm1', 'norm2', 'mlp.fc1', 'mlp.fc2')
BLOCK = (
    *(f'attn.{name}' for name in ('logit_scale', 'q_bias', 'v_bias', 'qkv.weight')),
    *(f'attn.cpb_mlp.{name}' for name in ('0.weight', '0.bias', '2.weight')),
    *(f'{module}.{kind}' for module in WITH_BIAS for kind in ('weight', 'bias')),
)


def required_names(weights: Collection[str]) -> list[str]:
    """Names in our layout of everything that a backbone with these stages and blocks cannot do without."""
    stages = depths(weights)
    merging = ('reduction.weight', 'norm.weight', 'norm.bias')
    return [
        *(f'patch_embed.{part}.{kind}' for part in ('proj', 'norm') for kind in ('weight', 'bias')),
        *(f'layers.{i}.blocks.{j}.{name}' for i, depth in enumerate(stages) for j in range(depth) for name in BLOCK),
        *(f'layers.{i}.downsample.{name}' for i in range(len(stages) - 1) for name in merging),
    ]


def describe(shapes: Mapping[str, Sequence[int]]) -> str:
    """Architecture of weights in our layout, given by their shapes, for messages."""

    def first_axis(name: str) -> int | str:
        return next(iter(shapes.get(name, ())), '?')

    heads = tuple(first_axis(f'layers.{i}.blocks.0.attn.logit_scale') for i in range(num_stages(shapes)))
    extra = sum(name.endswith('.enorm.weight') for name in shapes)
    return f'embed_dims={first_axis("patch_embed.norm.weight")}, depths={tuple(depths(shapes))}, num_heads={heads}' + (
        f' and {extra} extra norms' if extra else ''
    )
