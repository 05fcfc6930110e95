"""Writers of the public checkpoint layouts of SwinV2, from the weights of our backbone.

They are independent of `swinv2_mm.checkpoints`, which reads these layouts. `test_layouts.py` compares them with models
of timm, transformers and torchvision.
"""

import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import oracles
import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from swinv2_mm.models import SwinTransformerV2

Weights = dict[str, Tensor]
Window = int | tuple[int, int]


def canonical(backbone: nn.Module) -> Weights:
    """The weights without buffers, by their official names; only the names of the output norms are ours."""
    return {k: v.clone() for k, v in backbone.state_dict().items() if not k.endswith('pretrained_window_size')}


# Buffers of a file


def _pair(window: Window) -> tuple[int, int]:
    return (window, window) if isinstance(window, int) else window


def coords_table(window: Window, pretrained: Window) -> Tensor:
    """(1, 2H - 1, 2W - 1, 2), computed in the order of the official code."""
    axes = []
    for w, p in zip(_pair(window), _pair(pretrained), strict=True):
        offset = torch.arange(-(w - 1), w, dtype=torch.float32) / (p - 1) * 8
        axes.append(torch.sign(offset) * torch.log2(torch.abs(offset) + 1.0) / 3.0)
    return torch.stack(torch.meshgrid(*axes, indexing='ij'), -1)[None]


def position_index(window: Window) -> Tensor:
    """(H * W, H * W): row of the table for each query and key."""
    height, width = _pair(window)
    token = torch.arange(height * width)
    y, x = token // width, token % width
    return (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1


def attention_mask(size: int, window: int) -> Tensor:
    """(windows, N, N) of a square feature map, windows shifted by half: -100 between tokens of different regions."""
    row = torch.arange(size)
    region = (row >= size - window).int() + (row >= size - window // 2).int()
    regions = (region[:, None] * 3 + region).view(size // window, window, size // window, window)
    regions = regions.transpose(1, 2).reshape(-1, window * window)
    return (regions[:, None] != regions[:, :, None]) * -100.0


def stored_buffers(
    weights: Weights, windows: Sequence[Window], pretrained: Sequence[Window], image_size: int | None = None
) -> Weights:
    """Tables of every block and, for an image size, masks of odd blocks with several windows."""
    buffers = {}
    for name in weights:
        if not name.endswith('attn.logit_scale'):
            continue
        attention = name.removesuffix('logit_scale')
        stage, block = (int(name.split('.')[i]) for i in (1, 3))
        window = windows[stage]
        buffers[attention + 'relative_coords_table'] = coords_table(window, pretrained[stage])
        buffers[attention + 'relative_position_index'] = position_index(window)
        size = image_size and image_size // (4 * 2**stage)
        if size and block % 2 and size > window:
            buffers[name.removesuffix('attn.logit_scale') + 'attn_mask'] = attention_mask(size, window)
    return buffers


def linear_head(weights: Weights, name: str, num_classes: int = 5) -> Weights:
    """A classifier on the last stage."""
    channels = len(next(reversed([v for k, v in weights.items() if k.startswith('layers.') and 'norm2' in k])))
    return {f'{name}.weight': torch.full((num_classes, channels), 0.5), f'{name}.bias': torch.ones(num_classes)}


def _output_norms(weights: Weights) -> list[str]:
    return sorted({k.split('.')[0] for k in weights if k.startswith('norm')})


def _with_final_norm(weights: Weights, name: str | None) -> Weights:
    """The weights of a classifier: the norm of the last stage under a name, and no norms of other stages."""
    last = _output_norms(weights)[-1]
    renamed = {k: v for k, v in weights.items() if not k.startswith('norm')}
    if name is not None:
        renamed |= {f'{name}.{part}': weights[f'{last}.{part}'] for part in ('weight', 'bias')}
    return renamed


def _rename(weights: Weights, *pairs: tuple[str, str]) -> Weights:
    renamed = {}
    for name, value in weights.items():
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[name] = value
    assert len(renamed) == len(weights)
    return renamed


def _prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


# Microsoft


@contextmanager
def _yacs() -> Iterator[type]:
    """The class of the official configs, importable only here: users who load a file do not have yacs."""

    class CfgNode(dict):
        def __init__(self, values: dict) -> None:
            super().__init__({k: CfgNode(v) if isinstance(v, dict) else v for k, v in values.items()})
            self.__dict__ |= {
                '__immutable__': True,
                '__deprecated_keys__': set(),
                '__renamed_keys__': {},
                '__new_allowed__': False,
            }

    assert 'yacs' not in sys.modules
    CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'
    package, module = ModuleType('yacs'), ModuleType('yacs.config')
    package.config, module.CfgNode = module, CfgNode
    sys.modules |= {'yacs': package, 'yacs.config': module}
    try:
        yield CfgNode
    finally:
        del sys.modules['yacs'], sys.modules['yacs.config']


def save_microsoft_file(model: Weights, path) -> None:
    """Save like the official training: the model with optimizer, scheduler and config."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    with _yacs() as cfg_node:
        config = cfg_node({'MODEL': {'TYPE': 'swinv2', 'SWINV2': {'DEPTHS': [2, 2, 2, 2]}}, 'AMP_ENABLE': True})
        torch.save(
            {
                'model': model,
                'optimizer': optimizer.state_dict(),
                'lr_scheduler': scheduler.state_dict(),
                'max_accuracy': 81.8,
                'epoch': 299,
                'config': config,
            },
            path,
        )


def official(
    weights: Weights, windows: Sequence[Window], pretrained: Sequence[Window], image_size: int | None = None
) -> Weights:
    """A classifier of the official code, with its three kinds of buffers."""
    buffers = stored_buffers(weights, windows, pretrained, image_size)
    return _with_final_norm(weights, 'norm') | buffers | linear_head(weights, 'head')


def simmim_pretrained(
    weights: Weights, windows: Sequence[Window], pretrained: Sequence[Window], image_size: int | None = None
) -> Weights:
    """An encoder without head, and the decoder of the image; `cpb_mlp` has its older name."""
    encoder = official(weights, windows, pretrained, image_size)
    encoder = {k: v for k, v in encoder.items() if not k.startswith('head.')}
    channels, last = len(weights['patch_embed.proj.bias']), len(encoder['norm.bias'])
    return _prefixed(_rename(encoder, ('cpb_mlp', 'rpe_mlp')), 'encoder.') | {
        'encoder.mask_token': torch.ones(1, 1, channels),
        'decoder.0.weight': torch.ones(3 * 32 * 32, last, 1, 1),
        'decoder.0.bias': torch.ones(3 * 32 * 32),
    }


def simmim_finetuned(
    weights: Weights, windows: Sequence[Window], pretrained: Sequence[Window], image_size: int | None = None
) -> Weights:
    """A classifier whose `cpb_mlp` has its older name."""
    return _rename(official(weights, windows, pretrained, image_size), ('cpb_mlp', 'rpe_mlp'))


def msra_dense(
    weights: Weights, windows: Sequence[Window], pretrained: Sequence[Window], image_size: int | None = None
) -> Weights:
    """A detector's backbone: an output norm for each stage, extra norms `enorm`, and no stored masks."""
    backbone = weights | stored_buffers(weights, windows, pretrained)
    detector = {'rpn_head.rpn_conv.weight': torch.ones(1), 'neck.lateral_convs.0.conv.bias': torch.ones(1)}
    return _prefixed(_rename(backbone, ('cpb_mlp', 'rpe_mlp')), 'backbone.') | detector


# Other libraries


def timm_old(weights: Weights, *_) -> Weights:
    """Timm before 0.9: the official names."""
    return _with_final_norm(weights, 'norm') | linear_head(weights, 'head')


def timm_new(weights: Weights, *_) -> Weights:
    """timm: patch merging is at the start of the next stage."""
    renamed = {oracles.timm_name(k): v for k, v in _with_final_norm(weights, 'norm').items()}
    return renamed | linear_head(weights, 'head.fc')


def torchvision(weights: Weights, windows: Sequence[Window], pretrained: Sequence[Window], *_) -> Weights:
    """torchvision: one sequence of stages and mergings, and an unused bias of the keys."""
    renamed = {}
    tables = stored_buffers(weights, windows, pretrained)
    for name, value in (_with_final_norm(weights, 'norm') | tables).items():
        parts = name.split('.')
        if parts[0] == 'layers' and parts[2] == 'blocks':
            name = '.'.join([f'features.{2 * int(parts[1]) + 1}', *parts[3:]])
        elif parts[0] == 'layers':
            name = '.'.join([f'features.{2 * int(parts[1]) + 2}', *parts[3:]])
        elif parts[0] == 'patch_embed':
            name = '.'.join(['features.0', '0' if parts[1] == 'proj' else '2', parts[2]])
        if name.endswith('v_bias'):
            continue
        if name.endswith('q_bias'):
            v_bias = weights['.'.join(parts).replace('q_bias', 'v_bias')]
            value = torch.cat((value, torch.full_like(value, 7.0), v_bias))
        if name.endswith('relative_position_index'):
            value = value.flatten()
        renamed[name] = value
    renamed = _rename(renamed, ('mlp.fc1', 'mlp.0'), ('mlp.fc2', 'mlp.3'), ('attn.q_bias', 'attn.qkv.bias'))
    return renamed | linear_head(weights, 'head')


def mmpretrain_columns(reduction: Tensor) -> Tensor:
    """Columns of a merging in the order of `nn.Unfold`, where channels vary slowest and the four patches row by row.

    The official code concatenates the channels of four patches, and goes through them column by column.
    """
    by_patch = reduction.view(len(reduction), 2, 2, -1)  # x, y, channels
    return by_patch.permute(0, 3, 2, 1).reshape(reduction.shape)


def mmpretrain(weights: Weights, windows: Sequence[Window], pretrained: Sequence[Window], *_) -> Weights:
    """mmpretrain: merging of unfolded patches at the start of the next stage; `norm3` has two meanings."""
    tables = stored_buffers(weights, windows, pretrained)
    last = _output_norms(weights)[-1]
    renamed = {oracles.timm_name(k): v for k, v in (_with_final_norm(weights, None) | tables).items()}
    renamed = _rename(
        renamed,
        ('patch_embed.proj.', 'patch_embed.projection.'),
        ('layers.', 'stages.'),
        ('.attn.', '.attn.w_msa.'),
        ('mlp.fc1', 'ffn.layers.0.0'),
        ('mlp.fc2', 'ffn.layers.1'),
        ('.enorm.', '.norm3.'),
    )
    for name in [k for k in renamed if k.endswith('reduction.weight')]:
        renamed[name] = mmpretrain_columns(renamed[name])
    renamed |= {k: v for k, v in weights.items() if k.startswith(f'{last}.')}
    return _prefixed(renamed, 'backbone.') | linear_head(weights, 'head.fc')


def hf_backbone(weights: Weights, *_) -> Weights:
    """A backbone of transformers: separate queries, keys and values, and no final norm."""
    renamed = {}
    for name, value in _with_final_norm(weights, None).items():
        theirs = oracles.hf_names(name)
        if name.endswith('qkv.weight'):
            parts = zip(('query', 'key', 'value'), value.chunk(3), strict=True)
            renamed |= {theirs.replace('qkv', part): chunk.clone() for part, chunk in parts}
        else:
            renamed[theirs.replace('q_bias', 'query.bias').replace('v_bias', 'value.bias')] = value
    return renamed


def _hf_model(weights: Weights) -> Weights:
    final = {k: v for k, v in _with_final_norm(weights, 'layernorm').items() if k.startswith('layernorm.')}
    return _prefixed(hf_backbone(weights) | final, 'swinv2.')


def hf_classifier(weights: Weights, *_) -> Weights:
    """A classifier of transformers."""
    return _hf_model(weights) | linear_head(weights, 'classifier')


def hf_masked_image(weights: Weights, *_) -> Weights:
    """SimMIM in transformers."""
    model = _hf_model(weights)
    channels, last = len(weights['patch_embed.proj.bias']), len(model['swinv2.layernorm.bias'])
    return model | {
        'swinv2.embeddings.mask_token': torch.ones(1, 1, channels),
        'decoder.0.weight': torch.ones(3 * 32 * 32, last, 1, 1),
        'decoder.0.bias': torch.ones(3 * 32 * 32),
    }


# A file of each layout

# no stage of one head: PyTorch's product with a single row depends on the number of rows in the last bit
ARCH = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16))
EXTRA_NORMS = dict(ARCH, extra_norm_every_n_blocks=2)
WINDOWS, PRETRAINED, IMAGE = (8, 8, 8, 4), (6, 6, 6, 3), 128
WRITERS = [
    'official',
    'simmim_pretrained',
    'simmim_finetuned',
    'msra_dense',
    'mmpretrain',
    'torchvision',
    'timm_old',
    'timm_new',
    'hf_backbone',
    'hf_classifier',
    'hf_masked_image',
]
MICROSOFT = ('official', 'simmim_pretrained', 'simmim_finetuned')
WITH_EXTRA_NORMS = ('msra_dense', 'mmpretrain')
WITHOUT_TABLES = ('timm_old', 'timm_new', 'hf_backbone', 'hf_classifier', 'hf_masked_image')


def arch_of(writer):
    """Architecture of the files of a layout."""
    return EXTRA_NORMS if writer in WITH_EXTRA_NORMS else ARCH


def pretrained_of(writer):
    """Pre-training windows that the config needs: None if the file has tables."""
    return PRETRAINED if writer in WITHOUT_TABLES else None


@functools.cache
def source_once(writer):
    """`source`, cached."""
    weights = canonical(oracles.randomize(SwinTransformerV2(arch_of(writer), WINDOWS, drop_path_rate=0.0)))
    return weights, globals()[writer](weights, WINDOWS, PRETRAINED, IMAGE)


def source(writer):
    """Our weights, and their dict in the layout. Callers may change the dicts, but not the tensors."""
    weights, model = source_once(writer)
    return dict(weights), dict(model)


def save(writer, model, path):
    """Save a dict of a layout like its public files; returns the path."""
    if writer in MICROSOFT:
        save_microsoft_file(model, path)
    elif writer in WITH_EXTRA_NORMS:  # the two of OpenMMLab
        torch.save({'meta': {'epoch': 300, 'CLASSES': ('tench', 'goldfish')}, 'state_dict': model}, path)
    else:
        torch.save(model, path)
    return str(path)


def weights_in_file(writer, weights):
    """The subset of our weights that a file of this layout has."""
    kept = {
        'msra_dense': ('norm0', 'norm1', 'norm2', 'norm3'),
        'hf_backbone': (),
    }.get(writer, ('norm3',))
    return {k: v for k, v in weights.items() if not k.startswith('norm') or k.split('.')[0] in kept}


# The log


@contextmanager
def recorded_log() -> Iterator[list[str]]:
    """Messages that `print_log(logger='current')` writes."""
    messages = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, recorder = MMLogger.get_current_instance(), Recorder()
    logger.addHandler(recorder)
    try:
        yield messages
    finally:
        logger.removeHandler(recorder)
