"""The plot of the activations' amplitude: its values compared with those of timm's blocks, then the tool itself."""

import json
from types import SimpleNamespace

import cv2
import matplotlib.image
import numpy as np
import pytest
import torch
from nano import ARCH, NANO_CONFIGS
from nano.seg import write_segments
from nano.video import shrink, write_frames, write_kinetics400
from oracles import randomize, timm_twin
from tool_runs import REPOSITORY, TOOLS, call, load_tool, refuse, run

from swinv2_mm.cli import launch
from swinv2_mm.models import SwinTransformer3DV2, SwinTransformerV2

TOOL = 'analysis_tools/plot_activation_amplitude.py'
DET = NANO_CONFIGS / 'det.py'


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOLS / TOOL)


@pytest.fixture(scope='module')
def backbone():
    """The backbone of nano/configs/det.py with random weights."""
    return randomize(SwinTransformerV2(ARCH, 4, out_indices=(1, 2, 3)))


@pytest.fixture
def checkpoint(backbone, tmp_path):
    path = tmp_path / 'det.pth'
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in backbone.state_dict().items()}, 'meta': {}}, path)
    return path


def channel_variance(outputs):
    """Mean variance of the channels of several outputs (B, *S, C)."""
    return torch.cat([out.flatten(0, -2) for out in outputs]).double().var(0, correction=0).mean().item()


def timm_amplitudes(backbone, images):
    """Amplitudes of the outputs of timm's blocks, of one size of images (N, C, H, W)."""
    twin = timm_twin(backbone, images.shape[-2:], ARCH, 4, (4, 4, 4, 4)).eval()
    amplitudes = []
    for stage in twin.layers:
        for block in stage.blocks:
            block.register_forward_hook(lambda _, args, out: amplitudes.append(channel_variance([out])))
    with torch.no_grad():
        twin.forward_features(images)
    return amplitudes


@pytest.mark.parametrize('how', [pytest.param(call, id='called'), pytest.param(run, marks=pytest.mark.slow)])
def test_amplitudes_of_a_detector_are_those_of_timm(how, backbone, checkpoint, shapes, tmp_path):
    out, numbers = tmp_path / 'amplitude.png', tmp_path / 'amplitude.json'
    options = ['--num-batches', 3, '--out', out, '--json', numbers, '--cfg-options', f'data_root={shapes}/']
    output = how(tmp_path, TOOL, DET, checkpoint, '--compare', DET, *options)

    files = sorted((shapes / 'val2017').iterdir())[:3]
    images = torch.from_numpy(np.stack([cv2.imread(str(file)) for file in files])).permute(0, 3, 1, 2)
    trained, initial = json.loads(numbers.read_text())
    assert list(trained['variance']) == [f'layers.{stage}.blocks.0' for stage in range(4)]
    expected = timm_amplitudes(backbone, (images.float() - 128) / 64)
    assert list(trained['variance'].values()) == pytest.approx(expected, rel=1e-4)
    assert (trained['name'], trained['config'], trained['checkpoint']) == ('det, det', str(DET), str(checkpoint))
    assert (initial['name'], initial['checkpoint']) == ('det', None)
    assert initial['variance'] != trained['variance']

    assert f'det, det: 4 blocks, variance {min(expected):.4g} to {max(expected):.4g}' in output
    assert f'layers.2.blocks: {expected[2]:.4g}' in output
    pixels = matplotlib.image.imread(out)[..., :3]
    assert (np.ptp(pixels, axis=-1) > 0.2).any()  # curves have a colour


def test_amplitudes_of_several_batches_and_extra_norms_equal_a_loop_over_blocks(tool):
    """A video backbone whose second block ends with a norm of the main branch, on clips of different sizes."""
    arch = dict(embed_dims=16, depths=(3, 1), num_heads=(1, 2), extra_norm_every_n_blocks=2)
    backbone = randomize(SwinTransformer3DV2(arch, (2, 3, 3), out_indices=(0, 1), with_cp=True)).eval()
    clips = [torch.randn(2, 3, 4, 24, 20), torch.randn(1, 3, 6, 36, 36)]
    outputs = []
    with torch.no_grad():
        for clip in clips:
            x, seen = backbone.patch_embed(clip), []
            for stage in backbone.layers:
                for block in stage.blocks:
                    x = x + block.norm1(block.attn(x))
                    x = x + block.norm2(block.mlp(x))
                    x = x if block.enorm is None else block.enorm(x)
                    seen.append(x)
                x = x if stage.downsample is None else stage.downsample(x)
            outputs.append(seen)
    model = SimpleNamespace(backbone=backbone, test_step=backbone)
    blocks = tool.find_blocks(model)
    amplitudes = tool.record_amplitudes(model, blocks, clips)
    assert list(amplitudes) == [f'layers.0.blocks.{i}' for i in range(3)] + ['layers.1.blocks.0']
    assert list(amplitudes.values()) == pytest.approx(
        [channel_variance(outs) for outs in zip(*outputs, strict=True)], rel=1e-5
    )
    assert not any(block._forward_hooks for block in blocks.values())


def seg_config(folder):
    return NANO_CONFIGS / 'seg.py', write_segments(folder / 'seg')


def video_config(folder):
    """The recipe at a nano size, on clips of the views of its test."""
    data = write_kinetics400(folder / 'kinetics400')
    recipe = REPOSITORY / 'configs/video/swinv2_t_k400_224x224x32.py'
    shrink(launch.load_config(str(recipe), dict(data_root=str(data)))).dump(folder / 'video.py')
    return folder / 'video.py', data


@pytest.mark.parametrize('make_config', [seg_config, video_config])
def test_amplitudes_of_a_segmentor_and_a_recognizer(make_config, tmp_path):
    config, data = make_config(tmp_path)
    options = ['--num-batches', 2, '--legend', 'start', '--out', 'start.svg', '--json', 'start.json']
    output = call(tmp_path, TOOL, config, *options, '--cfg-options', f'data_root={data}/')
    assert output.splitlines()[-2:] == ['start.svg', 'start.json']
    (start,) = json.loads((tmp_path / 'start.json').read_text())
    assert start['name'] == 'start'
    assert len(start['variance']) == 4
    assert all(variance > 0 for variance in start['variance'].values())
    assert '<svg' in (tmp_path / 'start.svg').read_text()


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--num-batches', 0], '--num-batches must be at least 1, got 0'),
        (['--out', 'a.txt'], 'the file must end in one of .'),
        (['--json', 'no_such_folder/a.json'], 'there is no folder no_such_folder'),
        (['--legend', 'a', 'b'], '--legend must name 1 models, got 2'),
        (['--compare', 'a.py', 'b.pth', 'c.pth'], '--compare takes a config and a checkpoint, got a.py b.pth c.pth'),
        (['--compare', 'gone.py'], 'config gone.py does not exist'),
        (['--compare', DET, 'gone.pth'], 'CHECKPOINT: checkpoint gone.pth does not exist'),
        (['--cfg-options', 'test_dataloader=None'], 'has no test_dataloader'),
        (['--cfg-options', 'data_root=gone'], 'test data: gone/'),
    ],
)
def test_plot_activation_amplitude_errors(shapes, tmp_path, args, message):
    options = args if '--cfg-options' in args else [*args, '--cfg-options', f'data_root={shapes}/']
    assert message in refuse(tmp_path, TOOL, DET, *options)


def test_plot_activation_amplitude_of_a_backbone_without_blocks(tmp_path):
    data = write_frames(tmp_path / 'video')
    message = refuse(tmp_path, TOOL, NANO_CONFIGS / 'video.py', '--cfg-options', f'data_root={data}/')
    assert 'model.backbone: MobileNetV2 has no attribute `blocks`' in message
