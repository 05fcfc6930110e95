"""The study of larger windows: its position biases against independent formulas, then the whole command."""

import itertools
import json
import math

import matplotlib.image
import numpy as np
import pytest
import torch
from tool_runs import REPOSITORY, call, load_tool, run

from swinv2_mm.models.log_cpb import LogCPB

TOOL = REPOSITORY / 'projects/window_transfer/study_window_transfer.py'
BIASES = ('table', 'linear', 'log')


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOL)


@pytest.fixture(scope='module')
def models(tool):
    pytest.importorskip('mmseg')
    return {bias: tool.build_model(bias, 3, (4, 4, 2, 1), (4, 4, 2, 1)) for bias in BIASES}


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
def test_linear_cpb_is_the_mlp_on_offsets_relative_to_the_largest_of_training(tool, window):
    log_cpb = LogCPB((4, 4), (4, 4), 3)
    first, last = log_cpb[0], log_cpb[2]
    bias = set_window(tool.LinearCPB(log_cpb), window)().detach()
    for row, offset in enumerate(itertools.product(*(range(1 - w, w) for w in window))):
        coords = torch.tensor(offset, dtype=torch.float64) / 3
        hidden = (first.weight.double() @ coords + first.bias.double()).clamp(min=0)
        expected = 16 / (1 + torch.exp(-(last.weight.double() @ hidden)))
        torch.testing.assert_close(bias[:, row].double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert bias.shape == (3, row + 1)


def test_table_bias_is_its_parameters_at_the_training_window(tool):
    bias = tool.TableBias(LogCPB((4, 4), (4, 4), 3))
    assert bias.table.shape == (3, 49)
    assert bias().eq(8).all()
    torch.nn.init.normal_(bias.table)
    expected = 16 / (1 + np.exp(-bias.table.detach().double().numpy()))
    np.testing.assert_allclose(bias().detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize('window', [(6, 6), (8, 8), (12, 12), (5, 9)])
def test_table_bias_is_resized_by_cubic_convolution_for_larger_windows(tool, window):
    bias = tool.TableBias(LogCPB((4, 4), (4, 4), 3))
    torch.nn.init.normal_(bias.table)
    grid = 16 * bias.table.detach().double().sigmoid().view(3, 7, 7).numpy()
    rows, columns = (cubic_matrix(7, 2 * w - 1) for w in window)
    expected = np.einsum('yi,xj,hij->hyx', rows, columns, grid).reshape(3, -1)
    np.testing.assert_allclose(set_window(bias, window)().detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_biases_start_near_eight_and_have_gradients(models):
    for model in models.values():
        for attention in [m for m in model.modules() if hasattr(m, 'cpb_mlp')]:
            bias = attention.cpb_mlp()
            assert (bias - 8).abs().max() < 4
            bias.sum().backward()
            assert all(p.grad is not None for p in attention.cpb_mlp.parameters())


@pytest.mark.parametrize('bias', ['table', 'linear'])
def test_build_model_has_the_same_other_weights_for_the_same_seed(models, bias):
    def other_weights(model):
        return {name: value for name, value in model.state_dict().items() if 'cpb_mlp' not in name}

    expected, found = other_weights(models['log']), other_weights(models[bias])
    assert list(expected) == list(found)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    types = {type(m.cpb_mlp).__name__ for m in models[bias].modules() if hasattr(m, 'cpb_mlp')}
    assert types == {{'table': 'TableBias', 'linear': 'LinearCPB'}[bias]}


@pytest.mark.parametrize('bias', BIASES)
def test_enlarge_copies_every_weight(tool, models, bias):
    larger = tool.enlarge(models[bias], bias, (8, 8, 4, 2), (4, 4, 2, 1))
    source, target = models[bias].state_dict(), larger.state_dict()
    assert source.keys() == target.keys()
    assert all(torch.equal(value, target[name]) for name, value in source.items())
    assert [a.cpb_mlp().shape[1] for a in tool.attentions(larger)][::2] == [225, 225, 49, 9]


def test_enlarge_agrees_with_load_state_dict_for_log_cpb(tool, models):
    enlarged = tool.enlarge(models['log'], 'log', (8, 8, 4, 2), (4, 4, 2, 1))
    loaded = tool.build_model('log', 9, (8, 8, 4, 2), (4, 4, 2, 1)).eval()
    loaded.load_state_dict(models['log'].state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(enlarged(x), loaded(x))


def test_no_bias_is_zero(tool):
    bias = tool.NoBias(LogCPB((6, 6), (4, 4), 3))
    assert torch.equal(bias(), torch.zeros(3, 121))


def test_mean_iou_agrees_with_a_confusion_matrix(tool):
    pytest.importorskip('mmseg')
    truth = np.random.default_rng(0).integers(0, 7, (3, 8, 8)).astype(np.uint8)
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)

    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.cat([x, -x, x[:, :1] * 0.5], 1)

    predicted = Model()(tool.to_input(images)).argmax(1).numpy()
    matrix = np.zeros((7, 7))
    np.add.at(matrix, (truth, predicted), 1)
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert tool.mean_iou(Model(), images, truth, batch_size=2) == pytest.approx(100 * iou.mean())


def test_batches_depend_only_on_the_seed_and_flip_images_with_their_labels(tool):
    labels = np.random.default_rng(0).integers(0, 7, (5, 4, 4)).astype(np.uint8)
    images = np.repeat(labels[..., None], 3, -1)
    first, again, other = (list(tool.batches(images, labels, 2, 7, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not all(torch.equal(x[1], y[1]) for x, y in zip(first, other, strict=True))
    for x, y in first:
        assert torch.equal(x[:, 0], (y - 127.5) / 64)


def test_markdown_and_plot_have_means_deviations_and_gains(tool):
    args = tool.parse_args(['--factors', '1', '2', '--biases', 'table', 'log', '--seeds', '0', '1'])
    scores = {
        ('table', 0): [50.0, 40.0],
        ('table', 1): [52.0, 44.0],
        ('log', 0): [51.0, 50.0],
        ('log', 1): [51.0, 52.0],
    }
    results = [dict(bias=b, seed=s, miou=v, miou_without_bias=[1.0, 2.0]) for (b, s), v in scores.items()]
    lines = tool.markdown(results, args).splitlines()
    assert lines[0] == '| mIoU, % | W4, I64 | W8, I128 |'
    assert lines[2] == '| Parameterized | 51.0 ± 1.4 | 42.0 ± 2.8 |'
    assert lines[3] == '| Log CPB | 51.0 ± 0.0 (+0.0) | 51.0 ± 1.4 (+9.0) |'
    assert '| Log CPB, removed | 1.0 ± 0.0 | 2.0 ± 0.0 |' in lines
    labels = [text.get_text() for text in tool.draw(results, args).axes[0].get_legend().get_texts()]
    assert labels == ['Parameterized', 'Log CPB']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--size 96 --window 6', 'at factor 1 they are [96, 6, 6, 6, 3]'),
        ('--factors 1 1.3', 'must be whole numbers at every stage and factor'),
        ('--size 72', 'must be whole numbers at every stage and factor'),
        ('--factors 0.5 1', '--factors must be at least 1, got 0.5'),
    ],
)
def test_parse_args_rejects_sizes_that_do_not_scale(tool, capsys, options, message):
    with pytest.raises(SystemExit):
        tool.parse_args(options.split())
    assert message in capsys.readouterr().err


OPTIONS = '--size 32 --window 2 --factors 1 2 --steps 2 --batch-size 2 --train-images 3 --test-images 2 --seeds 4'


def check_results(folder, printed, biases):
    stored = json.loads((folder / 'window_transfer.json').read_text())
    assert [(r['bias'], r['seed'], len(r['miou'])) for r in stored['results']] == [(b, 4, 2) for b in biases]
    assert stored['settings']['steps'] == 2
    score = stored['results'][0]['miou'][1]
    assert f'{score:.1f} ± 0.0 |' in next(s for s in printed.splitlines() if s.startswith('| Parameterized |'))
    assert matplotlib.image.imread(folder / 'window_transfer.png').std() > 0.01


class Pool:
    """A fake process pool that runs jobs in this process."""

    def __init__(self, processes, context, start, arguments):
        assert (processes, context.get_start_method()) == (1, 'spawn')
        start(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    map = staticmethod(map)


def test_main_writes_results_and_plot_and_prints_the_table(tool, tmp_path, monkeypatch):
    pytest.importorskip('mmseg')
    monkeypatch.setattr(tool, 'ProcessPoolExecutor', Pool)
    check_results(tmp_path, call(tmp_path, TOOL, *OPTIONS.split()), BIASES)


@pytest.mark.slow
def test_command_runs_jobs_in_new_processes(tmp_path):
    pytest.importorskip('mmseg')
    printed = run(tmp_path, TOOL, *OPTIONS.split(), '--biases', 'table', 'log', '--processes', '2')
    check_results(tmp_path, printed, ('table', 'log'))
