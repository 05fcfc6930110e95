"""Files with a part of a backbone, none of it, or more, and changed backbones: torch's loading is the oracle."""

import copy
import functools
import re

import layouts
import oracles
import pytest
import torch
from loading_paths import (
    ALL_STAGES,
    ARCH,
    PRETRAINED,
    detector_config,
    features,
    official_weights,
    same,
    source_backbone,
)
from mmengine.model import BaseModule
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from processes import run_processes
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.utils import parametrizations, prune, weight_norm

from swinv2_mm.checkpoints import CheckpointError
from swinv2_mm.models import SwinTransformer3DV2, SwinTransformerV2
from swinv2_mm.models.block import SwinBlock

PRETRAINED_AT_6 = dict(ALL_STAGES, pretrained_window_sizes=PRETRAINED)
BLOCK = 'layers.0.blocks.0.'


class LoRA(nn.Module):
    """A linear layer with an adapter, under the names of peft."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict(dict(default=nn.Linear(base_layer.in_features, 2, bias=False)))
        self.lora_B = nn.ModuleDict(dict(default=nn.Linear(2, base_layer.out_features, bias=False)))

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight + self.lora_B.default.weight @ self.lora_A.default.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Net(nn.Module):
    """A model around a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


def linear_layers(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def add_lora(model, pattern=''):
    for name, layer in linear_layers(model):
        if re.search(pattern, name):
            model.set_submodule(name, LoRA(layer))
    return model


def replace_patches(model):
    model.patch_embed.proj = nn.Conv2d(5, ARCH['embed_dims'], 6, 4)


def delete_a_stage(model):
    del model.layers[3]
    model.layers[2].downsample = None
    del model.norm3
    model.out_indices = (0, 1, 2)


def for_each_linear(function):
    return lambda model: [function(layer) for _, layer in linear_layers(model)]


def quantize(model):
    """Integers and a value that is no tensor, in the place of weights."""

    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('weight', torch.ones(3, dtype=torch.int8))

        def get_extra_state(self):
            return {'bits': 8}

        def set_extra_state(self, state):
            assert state == {'bits': 8}

    model.layers[1].blocks[0].mlp.fc1 = Quantized()


def append_a_stage(model):
    model.layers.append(copy.deepcopy(model.layers[3]))


CHANGES = {
    'a stage more': append_a_stage,
    'another patch embedding': replace_patches,
    'a stage less': delete_a_stage,
    'LoRA': add_lora,
    'LoRA of attention': functools.partial(add_lora, pattern='qkv|proj'),
    'weight_norm': for_each_linear(weight_norm),
    'parametrized': for_each_linear(parametrizations.weight_norm),
    'pruned': for_each_linear(lambda layer: prune.l1_unstructured(layer, 'weight', 0.5)),
    'quantized': quantize,
}


def changed(change, **options):
    model = SwinTransformerV2(**ALL_STAGES | options)
    CHANGES[change](model)
    return model


def take(state, pattern):
    return {name: value for name, value in state.items() if re.search(pattern, name)}


def assert_same_state(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    wrong = [n for n, v in expected.items() if not (torch.equal(state[n], v) if torch.is_tensor(v) else state[n] == v)]
    assert wrong == []


# ---------------------------------------------------------------- a module loads its own state dict


@pytest.mark.parametrize('change', CHANGES)
def test_changed_backbone_loads_its_state(change, tmp_path):
    """By torch strictly, by mmengine from a file for itself, and for a model in which it is the backbone, as resumed.

    Its window of pre-training is in the state and nowhere else.
    """
    source = oracles.randomize(changed(change, pretrained_window_sizes=PRETRAINED))
    expected = source.state_dict()
    model = changed(change)
    model.load_state_dict(expected)
    assert_same_state(model, expected)

    torch.save({'state_dict': expected, 'meta': {}}, tmp_path / 'backbone.pth')
    model = changed(change)
    load_checkpoint(model, str(tmp_path / 'backbone.pth'), strict=True)
    assert_same_state(model, expected)

    full = Net(source).state_dict()
    torch.save({'state_dict': full, 'meta': {}}, tmp_path / 'full.pth')
    net = Net(changed(change))
    load_checkpoint(net, str(tmp_path / 'full.pth'), strict=True)
    assert_same_state(net, full)


def test_changed_backbone_computes_the_saved_features():
    source = oracles.randomize(add_lora(SwinTransformerV2(**PRETRAINED_AT_6), 'qkv|proj|fc'))
    model = add_lora(SwinTransformerV2(**ALL_STAGES), 'qkv|proj|fc')
    before = features(model)
    model.load_state_dict(source.state_dict())
    assert same(features(model), features(source))
    assert not same(features(model), before)


def load_in_shards():
    """What each process does: a state dict with adapters, into units of FSDP that keep the parameters' names."""
    expected = Net(oracles.randomize(changed('LoRA of attention', pretrained_window_sizes=PRETRAINED))).state_dict()
    for policy in (None, ModuleWrapPolicy({SwinBlock})):
        net = Net(changed('LoRA of attention'))
        net = FSDP(net, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device('cpu'))
        with FSDP.state_dict_type(net, StateDictType.FULL_STATE_DICT):
            net.load_state_dict(expected)
            assert_same_state(net, expected)


@pytest.mark.slow
def test_changed_backbone_in_fsdp_loads_its_state(tmp_path):
    run_processes(load_in_shards, folder=tmp_path)


def test_changed_backbone_refuses_a_file_of_the_original():
    with pytest.raises(CheckpointError, match=r'unexpected: .*qkv\.weight.*: load first, then change the model'):
        changed('LoRA').load_state_dict(source_backbone().state_dict())


def test_added_parameters_may_be_missing(tmp_path):
    """The rest of a file is checked as usual."""
    torch.save({'model': official_weights(source_backbone())}, tmp_path / 'file.pth')
    model = SwinTransformerV2(**ALL_STAGES)
    model.layers[0].blocks[0].adapter = nn.Linear(16, 16)
    kept = model.layers[0].blocks[0].adapter.weight.detach().clone()
    with layouts.recorded_log() as log:
        load_checkpoint(model, str(tmp_path / 'file.pth'))
    assert [line for line in log if 'lacks layers.0 (2 entries), norm0 (2 entries)' in line]
    assert torch.equal(model.layers[0].blocks[0].adapter.weight, kept)
    assert torch.equal(model.layers[0].blocks[0].mlp.fc1.weight, source_backbone().layers[0].blocks[0].mlp.fc1.weight)


# ---------------------------------------------------------------- parts of a state dict, as in torch


def as_torch_does(model, state, monkeypatch):
    """What torch's own loading makes of it, without the conversion; also what it returns."""
    model = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setattr(SwinTransformerV2, '_load_from_state_dict', nn.Module._load_from_state_dict)
        return model.load_state_dict(state, strict=False), model.state_dict()


PARTS = {
    'nothing': '$^',
    'no backbone': '^head',
    'adapters': 'lora_',
    'no adapters': '^(?!.*lora_)',
    'a stage': r'layers\.1\.',
    'no stage': r'^(?!.*layers\.1\.)',
    'norms': r'norm\d+\.',
    'half a norm': r'^(?!.*norm3\.bias)',
    'patches': 'patch_embed',
    'windows': 'pretrained_window_size',
}


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('make', [nn.Identity, Net], ids=['backbone', 'in a model'])
def test_partial_load_state_dict_is_that_of_torch(part, make, monkeypatch):
    def model(**options):
        backbone = add_lora(SwinTransformerV2(**ALL_STAGES | options), 'qkv')
        return Net(backbone) if make is Net else backbone

    source = oracles.randomize(model(pretrained_window_sizes=PRETRAINED)).state_dict()
    state = take(source, PARTS[part])
    loaded = model()
    expected, weights = as_torch_does(loaded, state, monkeypatch)
    with layouts.recorded_log() as log:
        assert loaded.load_state_dict(state, strict=False) == expected
    assert expected.missing_keys
    assert_same_state(loaded, weights)
    assert len([line for line in log if 'lacks' in line or 'nothing for the backbone' in line]) == 1
    with pytest.raises(RuntimeError, match=re.escape(expected.missing_keys[0])):
        loaded.load_state_dict(state)


def test_log_names_the_modules_that_a_file_lacks():
    model = add_lora(SwinTransformerV2(**PRETRAINED_AT_6), 'blocks.0.attn.qkv')
    with layouts.recorded_log() as log:
        model.load_state_dict(take(model.state_dict(), r'lora_|layers\.[123]'), strict=False)
    (line,) = [line for line in log if 'lacks' in line]
    assert re.search(r'lacks patch_embed \(4 entries\), layers\.0 \(\d+ entries\), layers\.0\.downsample \(3 ', line)
    assert 'norm0 (2 entries)' in line
    assert 'layers.1' not in line


def test_partial_position_bias_needs_its_window():
    """One that is replaced; with a window of the config, or without a bias, there is nothing to ask."""
    state = take(source_backbone().state_dict(), r'cpb_mlp\.[02]')
    with pytest.raises(CheckpointError, match=r'window of stage 0 is unknown'):
        SwinTransformerV2(**ALL_STAGES).load_state_dict(state, strict=False)
    model = SwinTransformerV2(**PRETRAINED_AT_6)
    model.load_state_dict(state, strict=False)
    assert model.layers[3].blocks[0].attn.cpb_mlp.pretrained_window_size.tolist() == [3, 3]


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        (f'{BLOCK}mlp.fc1.bias', torch.ones(3), r'\(3,\) for \(64,\)'),
        (f'{BLOCK}mlp.fc1.bias', [1.0], r'not tensors: .*fc1\.bias'),
        (f'{BLOCK}mlp.fc1.bias', torch.ones(64, dtype=torch.int8), r'torch\.int8'),
        (f'{BLOCK}mlp.fc3.bias', torch.ones(64), 'no Swin V2'),
    ],
)
def test_partial_weights_that_do_not_fit_are_an_error(name, value, message):
    model = SwinTransformerV2(**ALL_STAGES)
    with pytest.raises(CheckpointError, match=message):
        model.load_state_dict({name: value, f'{BLOCK}mlp.fc2.bias': torch.ones(16)}, strict=False)
    assert not model.layers[0].blocks[0].mlp.fc2.bias.any()


def test_partial_weights_of_another_layout_are_an_error():
    """Names that are not ours: what was left out on purpose is unknown."""
    state = official_weights(source_backbone())
    del state[f'{BLOCK}mlp.fc2.bias']
    with pytest.raises(CheckpointError, match=r'missing: .*mlp\.fc2\.bias'):
        SwinTransformerV2(**ALL_STAGES).load_state_dict(state, strict=False)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ('part', 'prefix'),
    [('no stage', None), ('no stage', 'backbone.'), ('norms', None), ('norms', 'backbone.'), ('no backbone', None)],
)
def test_init_cfg_needs_a_complete_backbone(part, prefix, tmp_path):
    state = take(Net(source_backbone()).state_dict(), PARTS[part])
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'file.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'), prefix=prefix)
    with pytest.raises(CheckpointError):
        SwinTransformerV2(**ALL_STAGES, init_cfg=init_cfg).init_weights()


def test_init_cfg_of_partial_weights_is_an_error(tmp_path):
    torch.save(take(source_backbone().state_dict(), PARTS['no stage']), tmp_path / 'file.pth')
    model = SwinTransformerV2(**ALL_STAGES, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth')))
    with pytest.raises(CheckpointError, match=r'missing: layers\.1\.'):
        model.init_weights()
    model.load_state_dict(torch.load(tmp_path / 'file.pth'), strict=False)  # called after the failure


def test_model_loads_adapters_from_a_file(tmp_path):
    """As a part of the backbone that does not claim to be one."""
    source = Net(add_lora(source_backbone(), 'qkv'))
    torch.save({'state_dict': take(source.state_dict(), 'lora_'), 'meta': {}}, tmp_path / 'adapters.pth')
    net = Net(add_lora(SwinTransformerV2(**ALL_STAGES), 'qkv'))
    before = copy.deepcopy(net.state_dict())
    load_checkpoint(net, str(tmp_path / 'adapters.pth'))
    assert_same_state(net, before | take(source.state_dict(), 'lora_'))


def test_model_refuses_a_partial_backbone(tmp_path):
    torch.save({'state_dict': take(Net(source_backbone()).state_dict(), PARTS['no stage'])}, tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match=r'file\.pth.*missing: layers\.1\.'):
        load_checkpoint(Net(SwinTransformerV2(**ALL_STAGES)), str(tmp_path / 'file.pth'))


class InitialisedNet(BaseModule):
    """A model whose init_cfg names a file of the model."""

    def __init__(self, **init_cfg) -> None:
        super().__init__(init_cfg=dict(type='Pretrained', **init_cfg))
        self.backbone = SwinTransformerV2(**ALL_STAGES)


@pytest.mark.parametrize('prefix', [None, 'model.'])
def test_init_cfg_of_a_model_needs_a_complete_backbone(prefix, tmp_path):
    state = take(Net(source_backbone()).state_dict(), PARTS['no stage'])
    state = {f'{prefix or ""}{name}': value for name, value in state.items()}
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match=r'missing: layers\.1\.'):
        InitialisedNet(checkpoint=str(tmp_path / 'file.pth'), prefix=prefix).init_weights()


@pytest.mark.parametrize('roots', [['model.backbone.'], ['teacher.backbone.', 'student.backbone.'], ['img_backbone.']])
def test_backbone_under_another_prefix_is_an_error(roots, tmp_path):
    """The suggestion of the message loads it."""
    source = source_backbone()
    state = {f'{root}{name}': value for root in roots for name, value in source.state_dict().items()}
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match=rf"file\.pth.* with prefix='{roots[0]}'"):
        load_checkpoint(Net(SwinTransformerV2(**ALL_STAGES)), str(tmp_path / 'file.pth'))
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'), prefix=roots[0])
    backbone = SwinTransformerV2(**ALL_STAGES, init_cfg=init_cfg)
    backbone.init_weights()
    assert_same_state(backbone, source.state_dict())


@pytest.mark.parametrize('root', ['', 'backbone.'])
def test_damaged_swin_v2_is_not_another_architecture(root, tmp_path):
    """Other architectures have no Log-CPB; this file has one, and lacks the keys that identify its layout."""
    state = {f'{root}{n}': v for n, v in source_backbone().state_dict().items() if not n.endswith('cpb_mlp.0.weight')}
    torch.save({'state_dict': state | {f'{root}more.weight': torch.ones(1)}, 'meta': {}}, tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match=r'it contains (no Swin V2|an incomplete Swin V2)'):
        load_checkpoint(Net(SwinTransformerV2(**ALL_STAGES)), str(tmp_path / 'file.pth'))


def test_stem_in_place_of_the_patch_embedding_is_not_resampled():
    model = SwinTransformerV2(**ALL_STAGES)
    model.patch_embed.proj = nn.Conv2d(3, ARCH['embed_dims'], 7, 4, 3)
    with pytest.raises(CheckpointError, match=r'of another shape: patch_embed\.proj\.weight'):
        model.load_state_dict(source_backbone().state_dict())


def detector(folder, **backbone):
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')
    cfg = detector_config(folder)
    if backbone:
        cfg.model.backbone = backbone
    return MODELS.build(cfg.model)


SWIN = dict(type='SwinTransformer', embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
STOCK = {'Swin V1': SWIN, 'ResNet': dict(type='ResNet', depth=18, base_channels=16), 'no backbone': None}


@pytest.mark.parametrize('stock', STOCK)
def test_detector_loads_neck_and_heads_of_a_stock_detector(stock, tmp_path):
    """The rest is as in torch: missing and unexpected keys, and an error if loading is strict."""
    theirs = oracles.randomize(detector(tmp_path, **STOCK[stock] or SWIN)).state_dict()
    if STOCK[stock] is None:
        theirs = take(theirs, '^(?!backbone)')
    model = detector(tmp_path)
    backbone = copy.deepcopy(take(model.state_dict(), '^backbone'))
    torch.save({'state_dict': theirs, 'meta': {}}, tmp_path / 'stock.pth')
    with layouts.recorded_log() as log:
        load_checkpoint(model, str(tmp_path / 'stock.pth'))
    assert_same_state(model, backbone | take(theirs, '^(?!backbone)'))
    (line,) = [line for line in log if 'SwinV2' in line]
    assert 'stays as it is' in line
    assert ('of another architecture' in line) == (STOCK[stock] is not None)

    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert set(missing) == set(backbone)
    assert set(unexpected) == set(take(theirs, '^backbone'))
    with pytest.raises(RuntimeError, match=r'Missing key.*backbone'):
        model.load_state_dict(theirs)


def test_detector_of_several_backbones_is_an_error():
    state = source_backbone().state_dict()
    twins = {f'backbone.{side}.{name}': value for side in ('left', 'right') for name, value in state.items()}
    with pytest.raises(CheckpointError, match='several Swin V2'):
        Net(SwinTransformerV2(**ALL_STAGES)).load_state_dict(twins, strict=False)


# ---------------------------------------------------------------- more stages than the model has


def cut(**options):
    model = SwinTransformerV2(**ALL_STAGES | options)
    delete_a_stage(model)
    return model


@pytest.mark.parametrize('layout', ['official', 'mmpretrain', 'own'])
def test_stages_missing_in_the_model_are_dropped(layout, tmp_path):
    source = source_backbone()
    state = source.state_dict()
    if layout == 'own':
        torch.save(state, tmp_path / 'file.pth')
    else:
        weights = layouts.canonical(source)
        torch.save(getattr(layouts, layout)(weights, (8, 8, 8, 4), PRETRAINED, 128), tmp_path / 'file.pth')
    model = cut()
    with layouts.recorded_log() as log:
        load_checkpoint(model, str(tmp_path / 'file.pth'))
    assert_same_state(model, {name: value for name, value in state.items() if name in model.state_dict()})
    assert same(features(model), features(source)[:3])
    (line,) = [line for line in log if 'does not have' in line]
    parts = {'layers.3 (17 entries)', 'layers.2.downsample (3 entries)', 'norm3 (2 entries)'}
    assert set(line.rpartition(': ')[2].split(', ')) == parts


def test_video_model_of_fewer_stages_loads_an_image_file():
    source = source_backbone()
    arch = {key: value[:3] if isinstance(value, tuple) else value for key, value in ARCH.items()}
    options = dict(out_indices=(2,), drop_path_rate=0.0, patch_size=(1, 4, 4))
    model = SwinTransformer3DV2(arch, [(1, 8, 8)] * 3, **options)
    model.load_state_dict(official_weights(source))
    model.norm2.load_state_dict(source.norm2.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = source(image)[2]
        torch.testing.assert_close(model.eval()(image[:, :, None])[:, :, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('layers.2.blocks.2.norm1.weight', torch.ones(64), r'unexpected: layers\.2\.blocks\.2\.norm1\.weight'),
        ('layers.3.blocks.0.mlp.fc2.bias', None, r'unexpected: .*layers\.3\.'),
        ('layers.2.downsample.norm.weight', None, r'unexpected: .*layers\.'),
        ('layers.4.blocks.0.norm1.weight', torch.ones(16), r'unexpected: .*layers\.3\.'),
    ],
)
def test_only_complete_stages_are_dropped(name, value, message):
    """Common stages must have the same depth, and an incomplete stage belongs to no Swin V2."""
    state = official_weights(source_backbone()) | {name: value}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        cut().load_state_dict(state)
