"""The plot of the position bias: its values compared with timm's attention, then the tool as users run it."""

import matplotlib.image
import numpy as np
import pytest
import torch
from oracles import find_peers, randomize
from tool_runs import TOOLS, call, load_tool, refuse, run
from torch import nn

from swinv2_mm.models import SwinTransformerV2
from swinv2_mm.models.log_cpb import LogCPB

TOOL = 'analysis_tools/plot_position_bias.py'
ARCH = dict(embed_dims=16, depths=(2, 3, 2, 2), num_heads=(1, 2, 4, 8))
PRETRAINED = (12, 12, 12, 6)


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOLS / TOOL)


@pytest.fixture(scope='module')
def state_dict():
    return randomize(SwinTransformerV2(ARCH, 4, PRETRAINED)).state_dict()


@pytest.fixture
def checkpoint(state_dict, tmp_path):
    """A file in the official layout, without windows."""
    path = tmp_path / 'weights.pth'
    torch.save({'model': {k: v for k, v in state_dict.items() if is_official(k)}}, path)
    return path


def is_official(key):
    return not key.startswith('norm') and not key.endswith('pretrained_window_size')


def timm_bias(state_dict, stage, window):
    """The position bias of timm's attention: the input of its softmax when all queries and keys are zero."""
    find_peers()
    from timm.models.swin_transformer_v2 import WindowAttention

    heads, dim = ARCH['num_heads'][stage], ARCH['embed_dims'] * 2**stage
    attention = WindowAttention(dim, (window, window), heads, pretrained_window_size=(PRETRAINED[stage],) * 2)
    prefix = f'layers.{stage}.blocks.{ARCH["depths"][stage] - 1}.attn.cpb_mlp.'
    weights = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    weights.pop('pretrained_window_size')
    attention.cpb_mlp.load_state_dict(weights)
    nn.init.zeros_(attention.qkv.weight)
    seen = []
    attention.softmax.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        attention(torch.zeros(1, window**2, dim))
    return seen[0].view(heads, window, window, window, window)  # query row and column, key row and column


@pytest.mark.parametrize(('stage', 'window'), [(0, 12), (1, 5), (2, 16), (3, 7), (3, 1)])
def test_bias_maps_are_the_bias_of_timm(tool, state_dict, stage, window):
    maps = tool.bias_maps(state_dict, stage, window)
    assert maps.shape == (ARCH['num_heads'][stage], 2 * window - 1, 2 * window - 1)
    tokens = torch.arange(window)
    offsets = tokens[:, None] - tokens + window - 1  # query minus key, from 0
    bias = maps[:, offsets[:, None, :, None], offsets[None, :, None, :]]
    torch.testing.assert_close(bias, timm_bias(state_dict, stage, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('stage', range(4))
def test_bias_maps_of_two_windows_agree(tool, state_dict, stage):
    small, large = (tool.bias_maps(state_dict, stage, window) for window in (8, 20))
    assert small.std() > 0.1
    torch.testing.assert_close(large[:, 12:27, 12:27], small, rtol=1e-6, atol=1e-6)


def test_mosaic_has_every_map_once(tool):
    maps = np.arange(5 * 7 * 7, dtype=np.float32).reshape(5, 7, 7)
    canvas, corners = tool.mosaic(maps)
    assert canvas.shape == (15, 23)  # two rows of three, one pixel apart
    for (top, left), values in zip(corners, maps, strict=True):
        np.testing.assert_array_equal(canvas[top : top + 7, left : left + 7], values)
    assert np.isfinite(canvas).sum() == maps.size


def test_plot_position_bias_draws_every_stage(tool, state_dict, checkpoint, tmp_path):
    out = tmp_path / 'bias.png'
    output = run(tmp_path, TOOL, checkpoint, '--windows', 4, 8, '--out', out, '--pretrained-window-sizes', *PRETRAINED)
    assert output.splitlines()[-1] == str(out)
    for stage in range(4):
        maps = tool.bias_maps(state_dict, stage, 8)
        line = next(line for line in output.splitlines() if line.startswith(f'stage {stage}, '))
        assert f'pre-trained with {PRETRAINED[stage]} x {PRETRAINED[stage]}' in line
        assert f'{maps.min():.2f} to {maps.max():.2f} at 8' in line
    pixels = matplotlib.image.imread(out)[..., :3]
    height = len(pixels)
    for stage in range(4):  # each quarter of the height has colours, not only white, grey or black
        row = pixels[stage * height // 4 : (stage + 1) * height // 4]
        assert (np.ptp(row, axis=-1) > 0.2).mean() > 0.1


def test_plot_position_bias_of_our_checkpoint(state_dict, tmp_path):
    path = tmp_path / 'ours.pth'
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in state_dict.items()}, 'meta': {}}, path)
    output = call(tmp_path, TOOL, path, '--windows', 2, '--out', tmp_path / 'a.png')
    assert [f'stage {i}, pre-trained with {p} x {p}: ' in output for i, p in enumerate(PRETRAINED)] == [True] * 4


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ([], 'pass one number per stage, for example --pretrained-window-sizes 12 12 12 6'),
        (['--pretrained-window-sizes', 12, 6], 'pre-training windows must be 4 positive numbers'),
        (['--pretrained-window-sizes', 12, 12, 12, 0], 'pre-training windows must be 4 positive numbers'),
        (['--windows', 0], '--windows must be at least 1, got 0'),
        (['--out', 'no_such_folder/a.png'], 'there is no folder no_such_folder'),
        (['--out', 'a.txt'], 'the file must end in one of .'),
    ],
)
def test_plot_position_bias_errors(checkpoint, tmp_path, args, message):
    assert message in refuse(tmp_path, TOOL, checkpoint, '--windows', 8, *args)


def test_write_windows_only_fills_in_unknown_windows(tool, state_dict):
    mixed = dict(state_dict)
    mixed['layers.3.blocks.1.attn.cpb_mlp.pretrained_window_size'] = torch.tensor([0, 6])
    with pytest.raises(ValueError, match='pre-training window of stage 3 is not in'):
        tool.pretrained_window(mixed, 3)
    resolved = tool.write_windows(mixed, PRETRAINED)
    assert [tool.pretrained_window(resolved, stage) for stage in range(4)] == [(p, p) for p in PRETRAINED]
    with pytest.raises(ValueError, match='window of stage 3 is 6x6, but'):
        tool.write_windows(state_dict, [12, 12, 12, 8])


def test_bias_maps_of_a_video_backbone(tool):
    mlp = LogCPB((2, 5, 5), (8, 7, 7), 3)
    state_dict = {f'layers.0.blocks.0.attn.cpb_mlp.{k}': v for k, v in mlp.state_dict().items()}
    torch.testing.assert_close(tool.bias_maps(state_dict, 0, 5), mlp().view(3, 3, 9, 9)[:, 1])


def test_plot_position_bias_of_a_missing_checkpoint(tmp_path):
    assert 'gone.pth' in refuse(tmp_path, TOOL, tmp_path / 'gone.pth', '--windows', 8)
