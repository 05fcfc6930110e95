"""The study of rivals: scenes by brute force, biases by formulas, blocks by timm's Swin V1; then the command."""

import itertools
import json
import math
import sys

import matplotlib.image
import numpy as np
import oracles
import pytest
import torch
from tool_runs import REPOSITORY, call, load_tool, run

from swinv2_mm.models.block import SwinBlock
from swinv2_mm.models.log_cpb import LogCPB
from swinv2_mm.ops.window_attention import window_attention

TOOL = REPOSITORY / 'projects/ablations/study_ablations.py'
tool = load_tool(TOOL)
rivals, scenes = sys.modules['rivals'], sys.modules['scenes']
VARIANTS = ('none', 'table', 'linear', 'log', 'dot', 'pre_dot')


# ---------------------------------------------------------------- the scenes


@pytest.mark.parametrize('size', [32, 96])
def test_labels_are_the_directions_between_the_marks_of_the_images(size):
    """Find the red and the blue disc by their pixels; compare their offset with the four directions."""
    drawn = scenes.make_scenes(60, 3)
    rows, columns = np.mgrid[:size, :size]
    for image, label in zip(scenes.render(drawn, size), drawn.labels, strict=True):
        red, green, blue = image.numpy()
        marks = (red > 0.5) & (green < -0.5) & (blue < -0.5), (blue > 0.5) & (green < -0.3) & (red < -0.5)
        (x1, y1), (x2, y2) = ((columns[mark].mean(), rows[mark].mean()) for mark in marks)
        offsets = np.array([x2 - x1, y2 - y1, x1 - x2, y1 - y2])  # right, down, left, up
        assert offsets[label] > offsets.max() - 0.3  # of a pixel, which is as exact as the image is


def test_make_scenes_depends_on_the_seed_and_keeps_discs_apart_and_inside():
    drawn = scenes.make_scenes(500, 3)
    assert all(torch.equal(a, b) for a, b in zip(drawn, scenes.make_scenes(500, 3), strict=True))
    assert not torch.equal(drawn.labels, scenes.make_scenes(500, 4).labels)
    for first, second, *others in drawn.places.numpy():
        assert 0.2999 < math.dist(first, second) < 0.4501
        assert all(math.dist(a, b) > 0.2499 for a, b in itertools.combinations((first, second, *others), 2))
    assert drawn.places.min() > 0.0999
    assert drawn.places.max() < 0.9001
    counts = torch.bincount(drawn.labels)
    assert len(counts) == 4
    assert counts.min() > 90


def test_render_shows_the_same_scene_at_every_size():
    drawn = scenes.make_scenes(5, 3)
    small, large = scenes.render(drawn, 32), scenes.render(drawn, 96)
    assert small.abs().max() <= 1
    averaged = torch.nn.functional.avg_pool2d(large, 3)
    assert (averaged - small).abs().max() < 0.25  # at borders: one sample of a pixel, not its average
    assert (averaged - small).abs().mean() < 0.005


# ---------------------------------------------------------------- the position biases


def set_window(bias, window):
    """Set the window of a bias, and keep its weights."""
    bias.window_size = window
    return bias


def keys_cubic(x, a=-0.75):
    """Keys' kernel of cubic convolution, with the constant that bicubic resizing uses."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def cubic_matrix(source, target):
    """Weights (target, source) of one axis, pixel centres at halves, edges repeated."""
    matrix = np.zeros((target, source))
    for i in range(target):
        x = (i + 0.5) * source / target - 0.5
        for j in range(math.floor(x) - 1, math.floor(x) + 3):
            matrix[i, min(max(j, 0), source - 1)] += keys_cubic(x - j)
    return matrix


@pytest.mark.parametrize('window', [(4, 4), (6, 6), (12, 12), (5, 8)])
def test_linear_cpb_is_the_mlp_on_offsets_relative_to_the_largest_of_training(window):
    log_cpb = LogCPB((4, 4), (4, 4), 3)
    first, last = log_cpb[0], log_cpb[2]
    bias = set_window(rivals.LinearCPB(log_cpb), window)().detach()
    for row, offset in enumerate(itertools.product(*(range(1 - w, w) for w in window))):
        coords = torch.tensor(offset, dtype=torch.float64) / 3
        hidden = (first.weight.double() @ coords + first.bias.double()).clamp(min=0)
        expected = 16 / (1 + torch.exp(-(last.weight.double() @ hidden)))
        torch.testing.assert_close(bias[:, row].double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert bias.shape == (3, row + 1)


def test_table_bias_is_its_parameters_at_the_training_window():
    bias = rivals.TableBias(LogCPB((4, 4), (4, 4), 3))
    assert bias.table.shape == (3, 49)
    assert bias().eq(8).all()
    torch.nn.init.normal_(bias.table, std=0.1)
    expected = 16 / (1 + np.exp(-10 * bias.table.detach().double().numpy()))
    np.testing.assert_allclose(bias().detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize('window', [(6, 6), (8, 8), (12, 12), (5, 9)])
def test_table_bias_is_resized_by_cubic_convolution_for_larger_windows(window):
    bias = rivals.TableBias(LogCPB((4, 4), (4, 4), 3))
    torch.nn.init.normal_(bias.table, std=0.1)
    grid = 16 * (10 * bias.table.detach().double()).sigmoid().view(3, 7, 7).numpy()
    rows, columns = (cubic_matrix(7, 2 * w - 1) for w in window)
    expected = np.einsum('yi,xj,hij->hyx', rows, columns, grid).reshape(3, -1)
    np.testing.assert_allclose(set_window(bias, window)().detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_no_bias_is_zero():
    assert torch.equal(rivals.NoBias(LogCPB((6, 6), (4, 4), 3))(), torch.zeros(3, 121))


# ---------------------------------------------------------------- attention and norms


@pytest.mark.parametrize('size', [4, 8, 12])
def test_dot_product_attention_of_unit_vectors_is_cosine_attention(size):
    qkv = torch.randn(2, size, size, 3, 2, 16, dtype=torch.float64)
    qkv[..., :2, :, :] /= qkv[..., :2, :, :].norm(dim=-1, keepdim=True)
    bias = torch.randn(2, 49, dtype=torch.float64)
    scale = torch.full((2, 1, 1), -math.log(4), dtype=torch.float64)
    for shift in ((0, 0), (2, 2)):
        found = rivals.dot_product_attention(qkv, bias, (4, 4), shift)
        expected = window_attention(qkv, scale, bias, (4, 4), shift, backend='reference')
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('shift', [0, 2])
def test_pre_norm_with_dot_product_is_the_block_of_swin_v1(shift):
    """A block of timm with the same weights gives the same output."""
    oracles.find_peers()
    from timm.models.swin_transformer import SwinTransformerBlock

    theirs = SwinTransformerBlock(16, (8, 8), num_heads=2, window_size=4, shift_size=shift).eval()
    block = SwinBlock(
        16, 0.0, False, num_heads=2, window_size=(4, 4), shift_size=(shift, shift), pretrained_window_size=(4, 4)
    )
    block.attn.cpb_mlp = rivals.TableBias(block.attn.cpb_mlp)
    attention = block.attn
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        attention.qkv.weight.copy_(theirs.attn.qkv.weight)
        attention.q_bias.copy_(theirs.attn.qkv.bias[:16])
        attention.v_bias.copy_(theirs.attn.qkv.bias[32:])  # the bias of the keys cancels in the softmax
        theirs.attn.relative_position_bias_table.uniform_(1, 15)
        attention.cpb_mlp.table.copy_((theirs.attn.relative_position_bias_table / 16).logit().T / 10)
        for ours, other in (
            (attention.proj, theirs.attn.proj),
            (block.norm1, theirs.norm1),
            (block.norm2, theirs.norm2),
            (block.mlp, theirs.mlp),
        ):
            ours.load_state_dict(other.state_dict())
        block.attn = rivals.DotProductAttention(attention)
        x = torch.randn(2, 8, 8, 16)
        torch.testing.assert_close(rivals.PreNormBlock(block)(x), theirs(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the models


def build(name, window=4, seed=3):
    return tool.build_model(tool.VARIANTS[name], seed, window, 4).eval()


@pytest.mark.parametrize(
    ('name', 'types'),
    [
        ('none', ['SwinBlock', 'WindowAttention', 'NoBias']),
        ('table', ['SwinBlock', 'WindowAttention', 'TableBias']),
        ('linear', ['SwinBlock', 'WindowAttention', 'LinearCPB']),
        ('log', ['SwinBlock', 'WindowAttention', 'LogCPB']),
        ('dot', ['SwinBlock', 'DotProductAttention', 'TableBias']),
        ('pre_dot', ['PreNormBlock', 'DotProductAttention', 'TableBias']),
    ],
)
def test_build_model_replaces_all_blocks_and_keeps_the_other_weights(name, types):
    model, ours = build(name), build('log')
    blocks = rivals.blocks(model)
    assert len(blocks) == len(list(rivals.attentions(model))) == 4
    for block, attention in zip(blocks, rivals.attentions(model), strict=True):
        assert [type(m).__name__ for m in (block, block.attn, attention.cpb_mlp)] == types

    def other_weights(model):
        weights = {n.replace('.cosine', ''): v for n, v in model.state_dict().items()}
        return {n: v for n, v in weights.items() if 'cpb_mlp' not in n and 'logit_scale' not in n}

    expected, found = other_weights(ours), other_weights(model)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[n]) for n, value in expected.items())


@pytest.mark.parametrize('name', VARIANTS)
def test_all_parameters_have_gradients_and_biases_start_near_eight(name):
    model = build(name)
    model(torch.randn(1, 3, 32, 32))[0, 0].backward()
    assert all(p.grad is not None for p in model.parameters())
    for attention in rivals.attentions(model):
        assert (attention.cpb_mlp() - (0 if name == 'none' else 8)).abs().max() < 4


@pytest.mark.parametrize('name', VARIANTS)
def test_enlarge_copies_every_weight(name):
    model = build(name)
    larger = tool.enlarge(model, tool.VARIANTS[name], 12, 4)
    source, target = model.state_dict(), larger.state_dict()
    assert source.keys() == target.keys()
    assert all(torch.equal(value, target[key]) for key, value in source.items())
    assert {attention.cpb_mlp().shape[1] for attention in rivals.attentions(larger)} == {23**2}


def test_enlarge_agrees_with_load_state_dict_for_log_cpb():
    model, loaded = build('log'), build('log', 8, seed=9)
    loaded.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(tool.enlarge(model, tool.VARIANTS['log'], 8, 4)(x), loaded(x))


@pytest.mark.parametrize('window', [4, 8])
def test_model_without_bias_does_not_know_the_place_of_a_window(window):
    """Mirror the cells of a merge as wholes: pooled features of a model without bias stay, with Log-CPB they do not."""
    x = torch.randn(2, 3, 8 * window, 8 * window)
    cells = x.unflatten(3, (-1, 8))  # 2x2 patches of 4 pixels are merged
    mirrored = cells.flip(3).flatten(3)
    with torch.no_grad():
        none, log = (
            tool.build_model(tool.VARIANTS[name], 3, window, window).eval().double() for name in ('none', 'log')
        )
        torch.testing.assert_close(none(mirrored.double()), none(x.double()))
        assert (log(mirrored.double()) - log(x.double())).abs().max() > 1e-5


def test_amplitudes_are_variances_of_the_blocks_outputs():
    model, x = build('pre_dot'), torch.randn(2, 3, 32, 32)
    found = tool.amplitudes(model, x)
    with torch.no_grad():
        tokens, expected = model.backbone.patch_embed(x), []
        for stage in model.backbone.layers:
            for block in stage.blocks:
                tokens = block(tokens)
                expected.append(np.var(tokens.double().numpy()))
            tokens = stage.downsample(tokens) if stage.downsample else tokens
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_accuracy_counts_right_answers_in_batches():
    drawn = scenes.make_scenes(7, 3)

    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.eye(4)[[2] * len(x)]

    expected = 100 * sum(label == 2 for label in drawn.labels.tolist()) / 7
    assert tool.accuracy(Model(), drawn, 16, batch_size=3) == pytest.approx(expected)


def test_batches_depend_only_on_the_seed():
    drawn = scenes.make_scenes(50, 3)
    first, again, other = (list(tool.batches(drawn, 4, 3, seed)) for seed in (1, 1, 2))
    assert [len(batch.labels) for batch in first] == [4, 4, 4]
    assert all(torch.equal(a.places, b.places) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a.places, b.places) for a, b in zip(first, other, strict=True))


# ---------------------------------------------------------------- results and command


def test_markdown_and_plot_have_means_and_deviations():
    args = tool.parse_args(['--factors', '1', '2', '--variants', 'table', 'log', '--seeds', '0', '1', '--window', '8'])
    scores = {
        ('table', 0): [50.0, 40.0],
        ('table', 1): [52.0, 44.0],
        ('log', 0): [51.0, 50.0],
        ('log', 1): [51.0, 52.0],
    }
    results = [
        dict(variant=v, seed=s, accuracy=a, without_bias=a[0] / 2, amplitudes=[1.0, 2.0, 3.0, 4.0 + s])
        for (v, s), a in scores.items()
    ]
    lines = tool.markdown(results, args).splitlines()
    assert lines[0] == '| accuracy, % | W8, I64 | W16, I128 | bias removed, W8 |'
    assert lines[2] == '| Parameterized | 51.0 ± 1.4 | 42.0 ± 2.8 | 25.5 ± 0.7 |'
    assert lines[3] == '| Log CPB | 51.0 ± 0.0 | 51.0 ± 1.4 | 25.5 ± 0.0 |'
    assert lines[-1] == '| Log CPB | 1.00 ± 0.00 | 2.00 ± 0.00 | 3.00 ± 0.00 | 4.50 ± 0.71 |'
    labels = [text.get_text() for text in tool.draw(results, args).legends[0].get_texts()]
    assert sorted(labels) == ['Log CPB', 'Parameterized', 'chance']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--window 6', '--window must be a multiple of 4, so that shifted windows do not cut 2x2 cells: 6'),
        ('--window 4 --factors 1 1.3', '--factors must be at least 1 and give whole windows, got [1.0, 1.3]'),
        ('--factors 0.5 1', '--factors must be at least 1 and give whole windows, got [0.5, 1.0]'),
    ],
)
def test_parse_args_rejects_windows(capsys, options, message):
    with pytest.raises(SystemExit):
        tool.parse_args(options.split())
    assert message in capsys.readouterr().err


OPTIONS = '--window 4 --factors 1 2 --steps 2 --batch-size 2 --train-scenes 9 --test-scenes 4 --seeds 4'


def check_results(folder, printed, variants):
    stored = json.loads((folder / 'ablations.json').read_text())
    assert [(r['variant'], r['seed'], len(r['accuracy'])) for r in stored['results']] == [(v, 4, 2) for v in variants]
    assert stored['settings']['steps'] == 2
    score = stored['results'][0]['accuracy'][1]
    label = tool.VARIANTS[variants[0]].label
    assert f'| {score:.1f} ± 0.0 |' in next(s for s in printed.splitlines() if s.startswith(f'| {label} |'))
    assert matplotlib.image.imread(folder / 'ablations.png').std() > 0.01


class Pool:
    """A fake process pool that runs jobs in this process."""

    def __init__(self, processes, context, start):
        assert (processes, context.get_start_method()) == (1, 'spawn')
        start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    map = staticmethod(map)


def test_main_writes_results_and_plot_and_prints_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, 'ProcessPoolExecutor', Pool)
    check_results(tmp_path, call(tmp_path, TOOL, *OPTIONS.split()), VARIANTS)


@pytest.mark.slow
def test_command_runs_jobs_in_new_processes(tmp_path):
    printed = run(tmp_path, TOOL, *OPTIONS.split(), '--variants', 'table', 'log', '--processes', '2')
    check_results(tmp_path, printed, ('table', 'log'))
