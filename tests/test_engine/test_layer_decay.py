"""Layer-wise learning-rate decay: the layer of each parameter, its learning rate, and steps of the optimizer."""

import re
from collections import Counter

import pytest
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from nano import NANO_CONFIGS
from processes import run_processes
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import swinv2_mm  # noqa: F401
from swinv2_mm.models import SimMIMSwinTransformerV2, SwinTransformer3DV2, SwinTransformerV2
from swinv2_mm.models.block import SwinBlock, SwinStage

ARCH = dict(embed_dims=16, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8), extra_norm_every_n_blocks=2)
SMALL = dict(embed_dims=16, depths=(1, 2), num_heads=(1, 2))
# the layers of ARCH, from the input to the output
LAYERS = [
    ['patch_embed', 'mask_token'],
    ['layers.0.blocks.0'],
    ['layers.0.blocks.1', 'layers.0.downsample'],
    ['layers.1.blocks.0'],
    ['layers.1.blocks.1', 'layers.1.downsample'],
    ['layers.2.blocks.0'],
    ['layers.2.blocks.1'],
    ['layers.2.blocks.2'],
    ['layers.2.blocks.3'],
    ['layers.2.blocks.4'],
    ['layers.2.blocks.5', 'layers.2.downsample'],
    ['layers.3.blocks.0'],
    ['layers.3.blocks.1'],
    ['norm0', 'norm1', 'norm2', 'norm3'],
]


class Model(nn.Module):
    """A backbone and a head, named as in models of the toolboxes."""

    def __init__(self, **backbone):
        super().__init__()
        self.backbone = SwinTransformerV2(**{'arch': SMALL, 'out_indices': (0, 1), 'drop_path_rate': 0.0, **backbone})
        self.head = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        return self.head(self.backbone(x)[-1])


def layer_by_hand(name):
    """Layer of a parameter of ARCH in the table; each must be in exactly one layer."""
    (layer,) = [i for i, parts in enumerate(LAYERS) if any(f'{name}.'.startswith(f'{part}.') for part in parts)]
    return layer


def build(model, rate=0.5, optimizer=None, **options):
    return build_optim_wrapper(
        model,
        dict(
            constructor='swinv2_mm.LearningRateDecayOptimWrapperConstructor',
            optimizer=optimizer or dict(type='AdamW', lr=1.0, weight_decay=0.25),
            paramwise_cfg=dict(layer_decay_rate=rate, **options),
        ),
    )


def settings(wrapper, model, key='lr'):
    """A setting of each parameter, by name; each parameter must be in exactly one group."""
    params = [(id(p), group) for group in wrapper.optimizer.param_groups for p in group['params']]
    groups = dict(params)
    assert len(groups) == len(params)
    return {name: groups.pop(id(p))[key] for name, p in model.named_parameters() if p.requires_grad}


# for SMALL, with one block in stage 0 and two in stage 1, and a decay rate of 0.5
def rate_by_hand(name):
    layers = {
        'backbone.patch_embed.': 1 / 16,
        'backbone.layers.0.': 1 / 8,
        'backbone.layers.1.blocks.0.': 1 / 4,
        'backbone.layers.1.blocks.1.': 1 / 2,
        'backbone.norm': 1,
        'head.': 1,
    }
    (rate,) = [rate for part, rate in layers.items() if name.startswith(part)]
    return rate


@pytest.mark.parametrize('backbone_class', [SwinTransformerV2, SwinTransformer3DV2, SimMIMSwinTransformerV2])
def test_get_layer_depth_equals_a_table_written_by_hand(backbone_class):
    with torch.device('meta'):
        model = backbone_class(ARCH)
    names = [name for name, _ in model.named_parameters()]
    assert {f'layers.2.blocks.5.{part}' for part in ('enorm.bias', 'attn.logit_scale', 'attn.q_bias')} <= set(names)
    for prefix in ('', 'backbone.'):
        assert {n: model.get_layer_depth(prefix + n, prefix) for n in names} == {
            n: (layer_by_hand(n), 14) for n in names
        }


@pytest.mark.parametrize(
    'name', ['decode_head.layers.0.blocks.0.weight', 'neck.patch_embed.bias', 'layers.0.blocks.0.w', 'backbones.layers']
)
def test_get_layer_depth_outside_the_backbone_is_the_last_layer(name):
    assert Model().backbone.get_layer_depth(name, 'backbone.') == (4, 5)


# blocks followed by an extra norm, or by patch merging, counted from 1 over all stages
@pytest.mark.parametrize(
    ('arch', 'last', 'extra_norms', 'mergings'),
    [
        ('huge', 25, {10, 16, 22}, {2, 4, 22}),
        ('giant', 51, {10, 16, 22, 28, 34, 40, 46}, {2, 4, 46}),
    ],
)
def test_get_layer_depth_of_huge_and_giant(arch, last, extra_norms, mergings):
    with torch.device('meta'):
        model = SwinTransformerV2(arch)
    counts = Counter(model.get_layer_depth(name)[0] for name, _ in model.named_parameters())
    # 9 of attention, 4 of the MLP, 2 of each norm, 3 of patch merging
    blocks = {k: 17 + 2 * (k in extra_norms) + 3 * (k in mergings) for k in range(1, last)}
    assert counts == {0: 4, **blocks, last: 8}


def test_layer_decay_sets_learning_rates_and_keeps_weight_decay_exemptions():
    model = Model(arch=ARCH, out_indices=(0, 1, 2, 3))
    wrapper = build(model, rate=0.95, optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05))
    rates = settings(wrapper, model)
    for name, rate in rates.items():
        layer = layer_by_hand(name.removeprefix('backbone.')) if name.startswith('backbone.') else 13
        assert rate == pytest.approx(2e-3 * 0.95 ** (13 - layer), rel=1e-12), name
    # 2e-3 * 0.95 ** 13, computed by hand
    assert rates['backbone.patch_embed.proj.weight'] == pytest.approx(1.026684e-3, rel=1e-6)
    assert rates['head.weight'] == 2e-3

    for name, decay in settings(wrapper, model, 'weight_decay').items():
        decayed = name.endswith('weight') and 'norm' not in name and 'cpb_mlp' not in name
        assert decay == (0.05 if decayed else 0.0), name


def test_layer_decay_in_a_step_of_sgd():
    model = Model()
    for p in model.parameters():
        nn.init.zeros_(p)
    wrapper = build(model, optimizer=dict(type='SGD', lr=1.0))
    wrapper.update_params(sum(p.sum() for p in model.parameters()))  # all gradients are 1
    for name, p in model.named_parameters():
        assert torch.equal(p, torch.full_like(p, -rate_by_hand(name))), name


def test_layer_decay_with_frozen_stages_and_with_cp():
    torch.manual_seed(0)
    model = Model(with_cp=True, frozen_stages=1).train()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)  # 0 in new blocks, where gradients would vanish
    wrapper = build(model, optimizer=dict(type='SGD', lr=1.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapper.backward(model(torch.rand(2, 3, 32, 32)).square().sum())
    wrapper.step()
    frozen = ('backbone.patch_embed.', 'backbone.layers.0.', 'backbone.norm0.')
    trained = {name for name in before if not name.startswith(frozen)}
    assert settings(wrapper, model).keys() == trained
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained
    for name in trained:
        p = model.get_parameter(name)
        torch.testing.assert_close(p, before[name] - rate_by_hand(name) * p.grad, msg=name)


def test_layer_decay_is_multiplied_by_custom_keys_and_bias_lr_mult():
    model = Model()
    rates = settings(build(model, custom_keys={'backbone': dict(lr_mult=0.125), 'mlp': dict(lr_mult=3)}), model)
    for name, rate in rates.items():
        # the longest matching key applies
        assert rate == rate_by_hand(name) * (0.125 if name.startswith('backbone') else 1), name
    rates = settings(build(model, custom_keys={'blocks.1.mlp': dict(lr_mult=3)}, bias_lr_mult=2), model)
    assert rates['backbone.layers.1.blocks.1.mlp.fc1.weight'] == 3 / 2
    assert rates['backbone.layers.1.blocks.1.mlp.fc1.bias'] == 3 / 2
    assert rates['backbone.layers.1.blocks.0.mlp.fc1.weight'] == 1 / 4
    assert rates['backbone.layers.1.blocks.0.mlp.fc1.bias'] == 2 / 4


VIDEO = dict(
    type='Recognizer3D',
    backbone=dict(
        type='swinv2_mm.SwinTransformer3DV2', arch=dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    ),
    cls_head=dict(type='I3DHead', in_channels=128, num_classes=2),
)


@pytest.mark.parametrize(
    ('toolbox', 'config', 'expected'),
    [
        ('mmdet', 'det.py', 'RetinaNet'),
        ('mmseg', 'seg.py', 'EncoderDecoder'),
        ('mmaction', 'video.py', 'Recognizer2D'),
        ('mmaction', None, 'Recognizer3D'),
    ],
)
def test_layer_decay_in_models_of_the_toolboxes(toolbox, config, expected):
    pytest.importorskip(toolbox)
    cfg = Config.fromfile(NANO_CONFIGS / config).model if config else VIDEO
    if config == 'video.py':  # it has another backbone
        cfg.backbone = Config.fromfile(NANO_CONFIGS / 'seg.py').model.backbone
    with DefaultScope.overwrite_default_scope(toolbox):
        model = MODELS.build(cfg)
        rates = settings(build(model), model)
    assert type(model).__name__ == expected
    # one block in each of the four stages
    layers = {name: re.match(r'backbone\.(patch_embed|layers\.\d)', name) for name in rates}
    for name, layer in layers.items():
        depth = 5 if layer is None else 0 if layer[1] == 'patch_embed' else 1 + int(layer[1][-1])
        assert rates[name] == 0.5 ** (5 - depth), name
    assert {rate for name, rate in rates.items() if not name.startswith('backbone.')} == {1.0}
    assert {rate for name, rate in rates.items() if name.startswith('backbone.norm')} == {1.0}
    assert len(set(rates.values())) == 6


def test_layer_decay_with_ddp_and_checkpoint_wrappers(tmp_path):
    model = Model()
    names = [name for name, _ in model.named_parameters()]
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, SwinStage))
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/meet', rank=0, world_size=1)
    try:
        wrapper = build(MMDistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()
    wrapped = settings(wrapper, model)
    assert 'backbone.layers.0._checkpoint_wrapped_module.blocks.0.attn.q_bias' in wrapped
    assert list(wrapped.values()) == [rate_by_hand(name) for name in names]


@pytest.mark.parametrize(
    ('paramwise', 'message'),
    [
        (dict(), 'layer_decay_rate .* must be a number above 0 and up to 1, such as 0.95, got None'),
        (dict(layer_decay_rate='0.95'), "got '0.95'"),
        (dict(layer_decay_rate=0), 'got 0'),
        (dict(layer_decay_rate=1.5), 'got 1.5'),
        (
            dict(decay_rate=0.9, decay_type='layer_wise', num_layers=12),
            r'not decay_rate \(write layer_decay_rate=0.9, .*\), decay_type \(leave it out.*\), num_layers \(leave',
        ),
        (dict(layer_decay_rate=0.9, backbone=dict(lr_mult=0.1)), r"custom_keys=\{'backbone': \{'lr_mult': 0.1\}\}"),
        (dict(layer_decay_rate=0.9, norm_decay=0.0), r"options \('layer_decay_rate', .*, but not norm_decay \("),
    ],
)
def test_layer_decay_names_missing_and_unknown_options(paramwise, message):
    constructor = 'swinv2_mm.LearningRateDecayOptimWrapperConstructor'
    optimizer = dict(type='SGD', lr=1.0)
    with pytest.raises(ValueError, match=message):
        build_optim_wrapper(Model(), dict(constructor=constructor, optimizer=optimizer, paramwise_cfg=paramwise))


def test_constructor_without_layer_decay_rejects_layer_decay_rate():
    cfg = dict(
        constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
        optimizer=dict(type='SGD', lr=1.0),
        paramwise_cfg=dict(layer_decay_rate=0.9),
    )
    with pytest.raises(ValueError, match='swinv2_mm.LearningRateDecayOptimWrapperConstructor'):
        build_optim_wrapper(Model(), cfg)


def test_layer_decay_needs_a_learning_rate():
    with pytest.raises(ValueError, match="set lr of the optimizer {'type': 'AdamW'}"):
        build(Model(), optimizer=dict(type='AdamW'))


@pytest.mark.parametrize(('model', 'backbone'), [(nn.Linear(2, 2), 'NoneType'), (nn.Module(), 'Conv2d')])
def test_layer_decay_needs_a_backbone_with_get_layer_depth(model, backbone):
    if backbone == 'Conv2d':
        model.backbone = nn.Conv2d(3, 3, 1)
    message = rf'{type(model).__name__}\.backbone is of type {backbone}: use .*swinv2_mm.SwinV2OptimWrapperConstructor'
    with pytest.raises(ValueError, match=message):
        build(model)


def build_shards(folder):
    """Settings of FSDP models, with and without nested units, for each process."""
    for policy in (None, ModuleWrapPolicy({SwinTransformerV2, SwinBlock})):
        options = dict(auto_wrap_policy=policy, device_id=torch.device('cpu'))
        model = FullyShardedDataParallel(Model(), use_orig_params=True, **options)
        assert {p.ndim for p in model.parameters()} == {1}
        wrapper = build(model)
        found = {key: settings(wrapper, model, key) for key in ('lr', 'weight_decay')}
        torch.save(found, folder / f'{get_rank()}_{"units" if policy else "whole"}.pt')
        with pytest.raises(ValueError, match='use_orig_params=True'):
            build(FullyShardedDataParallel(Model(), use_orig_params=False, **options))


def test_layer_decay_with_fsdp(tmp_path):
    """On two processes, where each parameter is a 1-D shard."""
    model = Model()
    wrapper = build(model)
    run_processes(build_shards, tmp_path, folder=tmp_path)
    for file in ('0_whole.pt', '1_whole.pt', '0_units.pt', '1_units.pt'):
        found = torch.load(tmp_path / file)
        for key in ('lr', 'weight_decay'):
            wanted = settings(wrapper, model, key)
            assert {name.replace('_fsdp_wrapped_module.', ''): v for name, v in found[key].items()} == wanted, file
