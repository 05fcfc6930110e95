"""The converter: it writes the weights of its source, and its errors name what is wrong."""

from pathlib import Path

import oracles
import pytest
import torch
from safetensors.torch import load_file
from tool_runs import call, refuse, run

from swinv2_mm.models import SwinTransformerV2

TOOL = 'model_converters/swinv2_to_mm.py'
ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
WINDOWS = (12, 12, 12, 6)


@pytest.fixture(scope='module')
def source() -> SwinTransformerV2:
    return oracles.randomize(SwinTransformerV2(ARCH, window_size=12, pretrained_window_sizes=WINDOWS))


@pytest.fixture
def timm_file(source, tmp_path) -> Path:
    """Weights under the names of timm, without windows."""
    weights = {oracles.timm_name(name): value for name, value in source.named_parameters()}
    torch.save(weights | {'head.fc.weight': torch.ones(1)}, tmp_path / 'timm.pth')
    return tmp_path / 'timm.pth'


@pytest.mark.parametrize(
    ('suffix', 'how'),
    [('.pth', call), ('.safetensors', call), pytest.param('.pth', run, marks=pytest.mark.slow)],
    ids=['pth', 'safetensors', 'as_users'],
)
def test_swinv2_to_mm_writes_weights_and_windows(source, timm_file, tmp_path, suffix, how):
    target = tmp_path / f'ours{suffix}'
    output = how(tmp_path, TOOL, timm_file, target, '--pretrained-window-sizes', *WINDOWS)
    assert 'pre-training windows: (12, 12), (12, 12), (12, 12), (6, 6)' in output
    weights = load_file(target) if suffix == '.safetensors' else torch.load(target)['state_dict']
    assert weights.keys() == source.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in source.state_dict().items())
    backbone = SwinTransformerV2(ARCH, window_size=24, init_cfg=dict(type='Pretrained', checkpoint=str(target)))
    backbone.init_weights()
    assert backbone.layers[3].blocks[0].attn.cpb_mlp.pretrained_window_size.tolist() == [6, 6]


def test_swinv2_to_mm_unknown_windows(timm_file, tmp_path):
    assert 'unknown: pass --pretrained-window-sizes' in call(tmp_path, TOOL, timm_file, tmp_path / 'a.pth')


@pytest.mark.parametrize(
    ('target', 'options', 'message'),
    [
        ('a.onnx', [], 'must end with .pth or .safetensors'),
        ('gone/a.pth', [], 'does not exist'),
        ('a.pth', ['--pretrained-window-sizes', 8, 8], 'must be 4 positive numbers, got (8, 8)'),
    ],
)
def test_swinv2_to_mm_errors(timm_file, tmp_path, target, options, message):
    assert message in refuse(tmp_path, TOOL, timm_file, tmp_path / target, *options)
    assert not (tmp_path / target).exists()


def test_swinv2_to_mm_names_a_missing_key(source, tmp_path):
    weights = dict(source.named_parameters())
    del weights['layers.1.blocks.0.mlp.fc2.bias']
    torch.save(weights, tmp_path / 'a.pth')
    assert 'missing: layers.1.blocks.0.mlp.fc2.bias' in refuse(tmp_path, TOOL, 'a.pth', 'b.pth')
