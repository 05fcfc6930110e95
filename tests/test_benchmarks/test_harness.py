"""The harness: its correctness gate against models that are made wrong, its tables, and its commands as a whole."""

import ast
import dataclasses
import json
import sys

import benchmark_attention
import benchmark_backbone
import correctness
import harness
import measure
import ours
import peers
import pytest
import results
import torch
from cases import NotSupportedError
from implementations import all_implementations
from mmengine.logging import MMLogger
from oracles import find_peers
from runners import share_weights
from shapes import SHAPES
from tool_runs import BENCHMARKS, call, refuse, run

COMMANDS = [pytest.param(command, id=command.__name__) for command in (benchmark_backbone, benchmark_attention)]
# each module imports only those before it
MODULES = (
    'peer_packages',
    'measure',
    'shapes',
    'cases',
    'ours',
    'peers',
    'implementations',
    'runners',
    'correctness',
    'results',
    'harness',
)

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read from /proc')


@pytest.fixture(autouse=True)
def _quiet():
    """No log line for each set of loaded weights; one thread, because the models are so small."""
    find_peers()
    logger = MMLogger.get_current_instance()
    level, threads = logger.level, torch.get_num_threads()
    logger.setLevel('WARNING')
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logger.setLevel(level)


def nano_case(names, command=benchmark_backbone):
    """The nano case with the implementations of these names."""
    known = all_implementations(torch.float32, ('transformers', 'torchvision'))
    implementations = [i for i in known if i.name in names]
    assert len(implementations) == len(names)
    stage = [] if command is benchmark_backbone else [0]
    return command.case('nano', *stage, 3, implementations)


def with_features(case, family, features):
    """The same case with another function for the features of a family."""
    changed = dataclasses.replace(case.families[family], features=features)
    return dataclasses.replace(case, families=case.families | {family: changed})


def measured(case, *modes):
    """The rows by mode and implementation."""
    tables = harness.measure(case, modes, torch.float32, rounds=1, peak=1e12)
    return {(row.mode, row.implementation): row for rows in tables for row in rows}


def test_modules_import_only_those_before_them():
    for number, name in enumerate(MODULES):
        tree = ast.parse((BENCHMARKS / f'{name}.py').read_text())
        found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        own = {path.stem for path in BENCHMARKS.glob('*.py')} & found
        assert own <= set(MODULES[:number]), name


def test_share_weights_shares_tensors_and_not_modules():
    model = ours.build_backbone(SHAPES['nano'])
    twin = share_weights(model)
    modules = zip(model.modules(), twin.modules(), strict=True)
    assert all(a is not b for a, b in modules)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))


# ---------------------------------------------------------------- the correctness gate


@pytest.mark.parametrize('command', COMMANDS)
def test_measure_finds_all_eager_implementations_correct(command, capsys):
    names = ['timm eager', 'timm sdpa eager', 'ours sdpa eager', 'ours reference eager', 'torchvision eager']
    names += ['transformers eager'] if command is benchmark_backbone else []
    case = nano_case(names, command)
    rows = measured(case, 'inference', 'step')
    assert {row.note for row in rows.values()} == {''}
    for (mode, _), row in rows.items():
        assert list(row.errors) == ['features'] + (['qkv grad', 'cpb grad'] if mode == 'step' else [])
        assert max(row.errors.values()) < 5e-5
        assert row.seconds > 0
        assert row.iqr == 0  # of one round
        assert row.images_per_second == pytest.approx(3 / row.seconds)
        assert row.peak_bytes >= 0
        assert row.compile_seconds is None
    base = rows['step', 'timm eager']
    assert base.relative == 1
    assert rows['step', 'ours sdpa eager'].relative == base.seconds / rows['step', 'ours sdpa eager'].seconds
    passes = 3 * case.flops * 3  # of three images
    assert base.share_of_peak == pytest.approx(passes / base.seconds / 1e12)
    assert capsys.readouterr().out.count('| timm sdpa eager') == 2


def test_measure_finds_all_steps_of_the_ablation_correct(monkeypatch):
    command = benchmark_backbone
    late = command.Backend(command.attend_with_sigmoid, lambda qkv: None)
    monkeypatch.setitem(command.BACKENDS, command.SIGMOID_LATE, late)
    implementations = [i for i in command.ablation(torch.float32) if not i.compiled]
    assert [i.name for i in implementations][:4] == [
        'timm eager',
        'ours, sigmoid after the gather',
        'sigmoid before the gather',
        'ours reference eager',
    ]
    rows = measured(command.case('nano', 2, implementations), 'forward_backward')
    notes = [row.note for row in rows.values()]
    assert notes[:4] == [''] * 4
    assert all(note == '' or note.startswith('not supported') for note in notes)  # backends that need a GPU


def test_measure_does_not_time_wrong_features(capsys):
    case = nano_case(['ours sdpa eager', 'timm eager'])
    wrong = with_features(case, 'timm', lambda model, x: 1.01 * model.forward_features(x))
    rows = measured(wrong, 'inference')
    assert rows['inference', 'ours sdpa eager'].note == ''
    row = rows['inference', 'timm eager']
    assert (row.note, row.seconds, row.peak_bytes) == ('WRONG', None, None)
    assert row.errors['features'] == pytest.approx(0.01, rel=1e-2)
    assert 'WRONG' in capsys.readouterr().out


def test_measure_finds_wrong_features_of_one_image():
    def swap_last_rows(model, x):
        features = model.forward_features(x)
        return torch.cat((features[:-1], features[-1:].flip(1)))

    case = with_features(nano_case(['timm eager']), 'timm', swap_last_rows)
    assert measured(case, 'inference')['inference', 'timm eager'].note == 'WRONG'


def test_measure_finds_wrong_gradients_only_in_training():
    def doubled(model, x):
        features = model.forward_features(x)
        return 2 * features - features.detach()

    case = with_features(nano_case(['timm eager']), 'timm', doubled)
    rows = measured(case, 'inference', 'forward_backward')
    assert rows['inference', 'timm eager'].note == ''
    row = rows['forward_backward', 'timm eager']
    assert row.note == 'WRONG'
    assert row.errors['qkv grad'] == pytest.approx(1, rel=1e-2)


def test_is_correct_allows_gradients_more_and_nan_never():
    is_correct = correctness.is_correct
    assert is_correct({'features': 3e-4, 'qkv grad': 24e-4}, torch.float32)
    assert not is_correct({'features': 4e-4}, torch.float32)
    assert is_correct({'features': 4e-4}, torch.bfloat16)
    assert not is_correct({'features': 0.0, 'cpb grad': float('nan')}, torch.bfloat16)


def test_measure_reports_the_error_of_an_implementation():
    def fail(model, x):
        raise RuntimeError('no kernel\nfor this')

    case = with_features(nano_case(['timm eager', 'ours sdpa eager']), 'timm', fail)
    rows = measured(case, 'inference')
    assert rows['inference', 'timm eager'].note == 'failed: RuntimeError: no kernel'
    assert rows['inference', 'ours sdpa eager'].relative == 1  # the first one that is timed


def test_measure_does_not_run_what_does_not_fit(monkeypatch):
    def must_not_run(model, x):
        raise AssertionError

    monkeypatch.setattr(correctness, 'available_memory', lambda: 500_000)
    case = with_features(nano_case(['timm eager', 'ours sdpa eager']), 'timm', must_not_run)
    rows = measured(case, 'inference')
    # 3 images, 4 windows of 64 tokens, 1 head, 12 bytes: 590 kB
    assert rows['inference', 'timm eager'].note.startswith('does not fit: N x N matrices of 0.0 GB')
    assert rows['inference', 'ours sdpa eager'].note == ''


def test_peers_refuse_shapes_that_they_compute_differently():
    for name, reason in (('video_t_320x320x8', 'only images'), ('b_w32_800x1333', 'padding')):
        for build in (peers.build_timm_backbone, peers.build_transformers_backbone, peers.build_torchvision_backbone):
            with pytest.raises(NotSupportedError, match=reason):
                build(SHAPES[name])
    with pytest.raises(NotSupportedError, match='smaller than the window'):
        peers.build_torchvision_backbone(SHAPES['b_w16_256'])


def test_import_peer_names_the_requirements_of_a_peer_that_is_not_installed():
    message = r'no_such_peer is not installed; see requirements/peers\.txt'
    with pytest.raises(NotSupportedError, match=message):
        peers.import_peer('no_such_peer')


# ---------------------------------------------------------------- results


def test_measure_profiles_each_implementation(capsys):
    case = nano_case(['ours sdpa eager', 'timm eager'])
    (rows,) = harness.measure(case, ['inference'], torch.float32, rounds=1, peak=1e12, profile=True)
    for row in rows:
        assert {'aten::addmm', 'aten::gelu', 'aten::native_layer_norm'} < set(row.operators)
    assert ['flash_attention' in ''.join(row.operators) for row in rows] == [False, True]
    table = capsys.readouterr().out.split('ms in operators')[1]
    assert '| operator | timm eager | ours sdpa eager |' in table
    first = next(iter(rows[0].operators))
    assert f'| `{first}` | {1000 * rows[0].operators[first]:.1f} |' in table


def test_print_profile_sums_up_all_but_the_largest_operators(capsys):
    names = [f'op{i}' for i in range(results.PROFILED)]
    first = dict.fromkeys(names, 0.002) | {'small': 0.001}
    rows = [
        results.Row('case', 'step', name, 1, 'float32', operators=operators)
        for name, operators in (('a', first), ('b', {'op0': 0.004, 'tiny': 0.0005}), ('c', {}))
    ]
    results.print_profile(rows)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == 'case, step: ms in operators'
    assert lines[2] == '| operator | a | b |'
    assert lines[4] == '| `op0` | 2.0 | 4.0 |'
    assert lines[5:-1] == [f'| `{name}` | 2.0 | 0.0 |' for name in names[1:]]
    assert lines[-1] == '| all others | 1.0 | 0.5 |'


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--shapes', 'nano', 'huge'], '--shapes huge is not known; there are: nano, t_w8_256, '),
        (
            ['--implementations', 'ours*', 'theirs*'],
            "no implementation matches --implementations 'theirs*'; there are: timm eager, ",
        ),
        (['--repeats', '0'], '--repeats must be at least 1, got 0'),
        (['--resume', 'no_such'], 'there is no folder no_such for the results of --resume'),
        (['--json', 'no_such/x.json'], 'there is no folder no_such for x.json'),
    ],
)
def test_check_arguments_names_the_mistake(command, arguments, message, tmp_path):
    assert refuse(tmp_path, command.__file__, *arguments).startswith(f'error: {message}')


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('no/x.json', 'there is no folder no for x.json: make it, or name another file'),
        ('folder', 'folder is a folder: name a file in it'),
        ('/proc/x.json', '/proc/x.json cannot be written: '),
    ],
)
@pytest.mark.parametrize(
    ('name', 'option'),
    [
        ('benchmark_operator', '--json'),
        ('benchmark_memory', '--json'),
        ('benchmark_backbone', '--plot'),
        ('tune_kernels', '--times'),
    ],
)
def test_commands_check_their_outputs_before_they_measure(name, option, path, message, tmp_path):
    (tmp_path / 'folder').mkdir()
    assert refuse(tmp_path, BENCHMARKS / f'{name}.py', option, path).startswith(f'error: {message}')


@pytest.fixture
def settings(monkeypatch):
    """Restore what a command sets for its process; and measure the peak of the machine with a small product."""
    monkeypatch.setattr(measure, 'GEMM', 64)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', torch.backends.cudnn.allow_tf32)
    saved = [(config, config.save_config()) for config in (torch._inductor.config, torch._dynamo.config)]
    yield
    for config, before in saved:
        config.load_config(before)


NANO = ['--shapes', 'nano', '--implementations', 'ours sdpa eager']


@pytest.mark.usefixtures('settings')
@pytest.mark.parametrize('command', COMMANDS)
def test_run_prints_writes_and_plots_all_rows(command, tmp_path):
    options = [*NANO, 'timm eager', '--modes', 'inference', 'step', '--repeats', '2', '--batch', '2', '--threads', '1']
    printed = call(tmp_path, command.__file__, *options, '--json', 'out.json', '--plot', 'out.png')
    content = json.loads((tmp_path / 'out.json').read_text())
    assert content['machine']['versions']['torch'] == torch.__version__
    assert content['machine']['peak_flops'] > 0
    found = [(row['mode'], row['implementation'], row['batch'], row['note']) for row in content['rows']]
    expected = [(mode, name, 2, '') for mode in ('inference', 'step') for name in ('timm eager', 'ours sdpa eager')]
    assert found[:4] == expected
    assert printed.count('| ours sdpa eager |') == len(content['rows']) // 2
    assert all(row['compile_seconds'] is None for row in content['rows'])
    assert (tmp_path / 'out.png').stat().st_size > 1000


@pytest.mark.usefixtures('settings')
@torch._inductor.config.patch(force_disable_caches=False)
def test_run_resumes(tmp_path):
    options = [*NANO, '--repeats', '1', '--batch', '2', '--resume', '.']
    call(tmp_path, BENCHMARKS / 'benchmark_backbone.py', *options, '--modes', 'step')
    (first,) = tmp_path.iterdir()
    written = first.read_text()
    assert [row['mode'] for row in json.loads(written)['rows']] == ['step']
    printed = call(tmp_path, BENCHMARKS / 'benchmark_backbone.py', *options, '--modes', 'inference', 'step')
    assert 'nano, inference' in printed
    assert 'nano, step' not in printed
    assert first.read_text() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ['nano-inference.json', 'nano-step.json']
    assert not torch._inductor.config.force_disable_caches


@pytest.mark.slow
def test_benchmark_backbone_reports_the_compilation_time(tmp_path):
    options = ['--shapes', 'nano', '--implementations', 'ours sdpa *', '--modes', 'inference', '--repeats', '2']
    options += ['--batch', '1', '--threads', '1', '--json', 'out.json']
    run(tmp_path, BENCHMARKS / 'benchmark_backbone.py', *options)
    content = json.loads((tmp_path / 'out.json').read_text())
    assert content['command'].endswith('--threads 1 --json out.json')
    eager, compiled = content['rows']
    assert (eager['implementation'], compiled['implementation']) == ('ours sdpa eager', 'ours sdpa compiled')
    assert eager['note'] == compiled['note'] == ''
    assert eager['compile_seconds'] is None
    assert compiled['compile_seconds'] > 0
