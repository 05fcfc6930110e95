"""The benchmarks: measuring against what is known, checks against models made wrong, then the tools as a whole."""

import dataclasses
import importlib
import json
import sys

import pytest
import torch
from mmengine.logging import MMLogger
from oracles import find_peers
from tool_runs import BENCHMARKS, call, refuse, run
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20
TOOL_NAMES = ('benchmark_backbone', 'benchmark_attention')

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read from /proc')


@pytest.fixture(scope='module')
def tool():
    """A function that imports a tool by its name, as the tools import each other."""
    find_peers()
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(autouse=True)
def _quiet_and_alone():
    """Without a line for each set of weights that is loaded; and threads of so small models would only wait."""
    logger = MMLogger.get_current_instance()
    level, threads = logger.level, torch.get_num_threads()
    logger.setLevel('WARNING')
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logger.setLevel(level)


@pytest.fixture
def side(tool):
    return tool('side_by_side')


def nano_case(tool, names, benchmark='benchmark_backbone'):
    peers, benchmark = tool('peers'), tool(benchmark)
    contenders = [c for c in peers.contenders(torch.float32, ('transformers', 'torchvision')) if c.name in names]
    assert len(contenders) == len(names)
    if benchmark.__name__ == 'benchmark_backbone':
        return benchmark.case('nano', 3, contenders)
    return benchmark.case('nano', 0, 3, contenders)


def with_features(case, family, features):
    changed = dataclasses.replace(case.families[family], features=features)
    return dataclasses.replace(case, families=case.families | {family: changed})


def measured(side, case, *modes):
    groups = side.measure(case, modes, torch.float32, rounds=1, peak=1e12)
    return {(row.mode, row.contender): row for group in groups for row in group}


# ---------------------------------------------------------------- what is known


@pytest.mark.parametrize(('name', 'size'), [('nano', (64, 64)), ('video_t_320x320x8', (8, 64, 64))])
def test_flops_are_those_of_the_products_that_torch_counts(tool, side, name, size):
    peers = tool('peers')
    shape = dataclasses.replace(side.SHAPES[name], size=size, window=(8, 8, 8)[-len(size) :])
    model = peers.our_backbone(shape, 'reference').eval()
    x = torch.zeros(1, 3, *size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    of_bias = [counts for name, counts in counter.get_flop_counts().items() if name.endswith('.cpb_mlp')]
    assert len(of_bias) == sum(shape.depths)
    # the MLP of the position bias does not belong to them: its result is kept
    assert shape.flops() == counter.get_total_flops() - sum(sum(counts.values()) for counts in of_bias)


def test_flops_and_logits_of_a_published_size(side):
    """The table of timm lists 55.25 billion multiply-adds with the position bias, which are 0.5 billion here."""
    shape = side.SHAPES['b_w24_384']
    assert shape.flops() / 2e9 == pytest.approx(54.7, abs=0.1)
    assert sum(shape.logits(i) * depth for i, depth in enumerate(shape.depths)) == pytest.approx(160.6e6, rel=1e-3)


def test_padding_counts_in_logits_but_not_in_flops(side):
    shape = dataclasses.replace(side.SHAPES['nano'], size=(36, 64))  # 9 x 16 tokens, windows of 8 x 8
    assert shape.is_padded()
    assert not side.SHAPES['nano'].is_padded()
    assert shape.logits(0) == 2 * 2 * 64**2
    assert shape.attention_flops(0) * 16 == side.SHAPES['nano'].attention_flops(0) * 9


def test_every_contender_takes_one_step_in_each_round(side):
    taken = []
    seconds = side.take_turns([lambda: taken.append('a'), lambda: taken.append('b')], 3)
    assert taken == ['a', 'b'] * 3
    assert [len(each) for each in seconds] == [3, 3]


@pytest.mark.parametrize('mib', [64, 300])
def test_peak_memory_is_that_of_the_step_alone(side, mib):
    before = torch.ones(400 * MIB // 4, device=side.DEVICE)  # a higher peak, and freed
    del before
    peak = side.peak_memory(lambda: torch.ones(mib * MIB // 4, device=side.DEVICE).sum())
    assert peak == pytest.approx(mib * MIB, abs=30 * MIB)


def test_contenders_of_a_family_share_their_weights_alone(tool, side):
    model = tool('peers').our_backbone(side.SHAPES['nano'])
    twin = side.share_weights(model)
    modules = zip(model.modules(), twin.modules(), strict=True)
    assert all(a is not b for a, b in modules)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))


# ---------------------------------------------------------------- checks of the contenders


@pytest.mark.parametrize('benchmark', TOOL_NAMES)
def test_all_eager_contenders_agree_with_the_reference(tool, side, benchmark, capsys):
    names = ['timm eager', 'timm sdpa eager', 'ours sdpa eager', 'ours reference eager', 'torchvision eager']
    names += ['transformers eager'] if benchmark == 'benchmark_backbone' else []
    peers = tool('peers')
    contenders = peers.contenders(torch.float32, ('transformers', 'torchvision'))
    case = nano_case(tool, [c.name for c in contenders if c.name in names], benchmark)
    rows = measured(side, case, 'inference', 'step')
    assert {row.note for row in rows.values()} == {''}
    for (mode, _), row in rows.items():
        assert list(row.errors) == ['features'] + (['qkv grad', 'cpb grad'] if mode == 'step' else [])
        assert max(row.errors.values()) < 5e-5
        assert row.seconds > 0
        assert row.images_per_second == pytest.approx(3 / row.seconds)
        assert row.peak_bytes >= 0
        assert row.compile_seconds is None
    base = rows['step', 'timm eager']
    assert base.relative == 1
    assert rows['step', 'ours sdpa eager'].relative == base.seconds / rows['step', 'ours sdpa eager'].seconds
    passes = 3 * case.flops * 3  # of three images
    assert base.share_of_peak == pytest.approx(passes / base.seconds / 1e12)
    assert capsys.readouterr().out.count('| timm sdpa eager') == 2


def test_rungs_of_the_ladder_agree_with_the_reference(tool, side, monkeypatch):
    benchmark = tool('benchmark_backbone')
    late = benchmark.Backend(benchmark.attend_with_sigmoid, lambda qkv: None)
    monkeypatch.setitem(benchmark.BACKENDS, benchmark.SIGMOID_LATE, late)
    rungs = [c for c in benchmark.ladder(torch.float32) if not c.compiled]
    assert [c.name for c in rungs][:4] == [
        'timm eager',
        'ours, sigmoid after the gather',
        'sigmoid before the gather',
        'ours reference eager',
    ]
    rows = measured(side, benchmark.case('nano', 2, rungs), 'forward_backward')
    notes = [row.note for row in rows.values()]
    assert notes[:4] == [''] * 4
    assert all(note == '' or note.startswith('not possible') for note in notes)  # backends that need a GPU


def test_wrong_features_get_no_times(tool, side, capsys):
    case = nano_case(tool, ['ours sdpa eager', 'timm eager'])
    wrong = with_features(case, 'timm', lambda model, x: 1.01 * model.forward_features(x))
    rows = measured(side, wrong, 'inference')
    assert rows['inference', 'ours sdpa eager'].note == ''
    row = rows['inference', 'timm eager']
    assert (row.note, row.seconds, row.peak_bytes) == ('WRONG', None, None)
    assert row.errors['features'] == pytest.approx(0.01, rel=1e-2)
    assert 'WRONG' in capsys.readouterr().out


def test_a_profile_accounts_for_all_of_a_step(side, monkeypatch):
    """The seconds of its operators, each without those that it calls, are the seconds of what is called at the top."""
    profiles, linear = [], torch.nn.Linear(64, 64)

    class Kept(torch.profiler.profile):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            profiles.append(self)

    monkeypatch.setattr(torch.profiler, 'profile', Kept)
    found = side.operators(lambda: torch.nn.functional.gelu(linear(torch.ones(300, 64))))
    assert {'aten::linear', 'aten::addmm', 'aten::gelu'} < set(found)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    top = [event for event in profiles[0].events() if event.cpu_parent is None]
    assert sum(found.values()) == pytest.approx(1e-6 * sum(event.cpu_time_total for event in top), rel=1e-3)


def test_a_profile_is_that_of_each_contender_and_is_printed(tool, side, capsys):
    case = nano_case(tool, ['ours sdpa eager', 'timm eager'])
    (rows,) = side.measure(case, ['inference'], torch.float32, rounds=1, peak=1e12, profile=True)
    for row in rows:
        assert {'aten::addmm', 'aten::gelu', 'aten::native_layer_norm'} < set(row.operators)
    assert ['flash_attention' in ''.join(row.operators) for row in rows] == [False, True]
    table = capsys.readouterr().out.split('ms in operators')[1]
    assert '| operator | timm eager | ours sdpa eager |' in table
    first = next(iter(rows[0].operators))
    assert f'| `{first}` | {1000 * rows[0].operators[first]:.1f} |' in table


def test_the_largest_operators_of_all_get_a_line_and_the_others_one(side, capsys):
    names = [f'op{i}' for i in range(side.PROFILED)]
    first = dict.fromkeys(names, 0.002) | {'small': 0.001}
    rows = [
        side.Row('case', 'step', name, 1, 'float32', operators=operators)
        for name, operators in (('a', first), ('b', {'op0': 0.004, 'tiny': 0.0005}), ('c', {}))
    ]
    side.print_profile(rows)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == 'case, step: ms in operators'
    assert lines[2] == '| operator | a | b |'
    assert lines[4] == '| `op0` | 2.0 | 4.0 |'
    assert lines[5:-1] == [f'| `{name}` | 2.0 | 0.0 |' for name in names[1:]]
    assert lines[-1] == '| all others | 1.0 | 0.5 |'


def test_wrong_features_of_one_image_are_found(tool, side):
    def swap_last_rows(model, x):
        features = model.forward_features(x)
        return torch.cat((features[:-1], features[-1:].flip(1)))

    case = with_features(nano_case(tool, ['timm eager']), 'timm', swap_last_rows)
    assert measured(side, case, 'inference')['inference', 'timm eager'].note == 'WRONG'


def test_wrong_gradients_are_wrong_in_training_alone(tool, side):
    def doubled(model, x):
        features = model.forward_features(x)
        return 2 * features - features.detach()

    case = with_features(nano_case(tool, ['timm eager']), 'timm', doubled)
    rows = measured(side, case, 'inference', 'forward_backward')
    assert rows['inference', 'timm eager'].note == ''
    row = rows['forward_backward', 'timm eager']
    assert row.note == 'WRONG'
    assert row.errors['qkv grad'] == pytest.approx(1, rel=1e-2)


def test_a_contender_that_fails_says_why(tool, side):
    def fail(model, x):
        raise RuntimeError('no kernel\nfor this')

    case = with_features(nano_case(tool, ['timm eager', 'ours sdpa eager']), 'timm', fail)
    rows = measured(side, case, 'inference')
    assert rows['inference', 'timm eager'].note == 'failed: RuntimeError: no kernel'
    assert rows['inference', 'ours sdpa eager'].relative == 1  # the first one with times


def test_what_does_not_fit_is_not_tried(tool, side, monkeypatch):
    def must_not_run(model, x):
        raise AssertionError

    monkeypatch.setattr(side, 'available_memory', lambda: 500_000)
    case = with_features(nano_case(tool, ['timm eager', 'ours sdpa eager']), 'timm', must_not_run)
    rows = measured(side, case, 'inference')
    # 3 images, 4 windows of 64 tokens, 1 head, 12 bytes: 590 kB
    assert rows['inference', 'timm eager'].note.startswith('does not fit: N x N matrices of 0.0 GB')
    assert rows['inference', 'ours sdpa eager'].note == ''


def test_peers_refuse_what_they_compute_otherwise(tool, side):
    peers = tool('peers')
    for name, reason in (('video_t_320x320x8', 'images alone'), ('b_w32_800x1333', 'padding')):
        for build in (peers.timm_backbone, peers.transformers_backbone, peers.torchvision_backbone):
            with pytest.raises(side.NotPossibleError, match=reason):
                build(side.SHAPES[name])
    with pytest.raises(side.NotPossibleError, match='smaller than the window'):
        peers.torchvision_backbone(side.SHAPES['b_w16_256'])


def test_a_peer_that_is_not_installed_says_how_to_install_it(tool, side):
    with pytest.raises(side.NotPossibleError, match=r'no_such_peer is not installed; see requirements/peers\.txt'):
        tool('peers').find('no_such_peer')


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize('benchmark', TOOL_NAMES)
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--shapes', 'nano', 'huge'], '--shapes huge is not known; there are: nano, t_w8_256, '),
        (['--contenders', 'ours*', 'theirs*'], "no contender fits --contenders 'theirs*'; there are: timm eager, "),
        (['--repeats', '0'], '--repeats must be at least 1, got 0'),
        (['--resume', 'no_such'], 'there is no folder no_such for the results of --resume'),
        (['--json', 'no_such/x.json'], 'there is no folder no_such for x.json'),
    ],
)
def test_mistakes_give_one_line(tool, benchmark, arguments, message, tmp_path):
    assert refuse(tmp_path, BENCHMARKS / f'{benchmark}.py', *arguments).startswith(f'error: {message}')


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
def test_results_that_cannot_be_written_are_named_before_anything_is_measured(name, option, path, message, tmp_path):
    (tmp_path / 'folder').mkdir()
    assert refuse(tmp_path, BENCHMARKS / f'{name}.py', option, path).startswith(f'error: {message}')


@pytest.fixture
def settings(tool, monkeypatch):
    """What a tool sets for its process is taken back; and no large product tells the peak of the machine."""
    monkeypatch.setattr(tool('side_by_side'), 'GEMM', 64)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', torch.backends.cudnn.allow_tf32)
    kept = [(config, config.save_config()) for config in (torch._inductor.config, torch._dynamo.config)]
    yield
    for config, former in kept:
        config.load_config(former)


@pytest.mark.usefixtures('settings')
@pytest.mark.parametrize('benchmark', TOOL_NAMES)
def test_all_rows_are_printed_written_and_drawn(benchmark, tmp_path):
    options = ['--shapes', 'nano', '--contenders', 'ours sdpa eager', 'timm eager', '--modes', 'inference', 'step']
    options += ['--repeats', '2', '--batch', '2', '--threads', '1', '--json', 'out.json', '--plot', 'out.png']
    printed = call(tmp_path, BENCHMARKS / f'{benchmark}.py', *options)
    content = json.loads((tmp_path / 'out.json').read_text())
    assert content['machine']['versions']['torch'] == torch.__version__
    assert content['machine']['peak_flops'] > 0
    found = [(row['mode'], row['contender'], row['batch'], row['note']) for row in content['rows']]
    expected = [(mode, name, 2, '') for mode in ('inference', 'step') for name in ('timm eager', 'ours sdpa eager')]
    assert found[:4] == expected
    assert printed.count('| ours sdpa eager |') == len(content['rows']) // 2
    assert all(row['compile_seconds'] is None for row in content['rows'])
    assert (tmp_path / 'out.png').stat().st_size > 1000


@pytest.mark.usefixtures('settings')
@torch._inductor.config.patch(force_disable_caches=False)
def test_a_run_that_was_stopped_goes_on(tmp_path):
    options = ['--shapes', 'nano', '--contenders', 'ours sdpa eager', '--repeats', '1', '--batch', '2', '--resume', '.']
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
def test_the_tool_compiles_and_tells_how_long_that_takes(tmp_path):
    options = ['--shapes', 'nano', '--contenders', 'ours sdpa *', '--modes', 'inference', '--repeats', '2']
    run(
        tmp_path,
        BENCHMARKS / 'benchmark_backbone.py',
        *options,
        '--batch',
        '1',
        '--threads',
        '1',
        '--json',
        'out.json',
    )
    content = json.loads((tmp_path / 'out.json').read_text())
    assert content['command'].endswith('--threads 1 --json out.json')
    eager, compiled = content['rows']
    assert (eager['contender'], compiled['contender']) == ('ours sdpa eager', 'ours sdpa compiled')
    assert eager['note'] == compiled['note'] == ''
    assert eager['compile_seconds'] is None
    assert compiled['compile_seconds'] > 0
