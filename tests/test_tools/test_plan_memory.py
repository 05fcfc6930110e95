"""The plan of a training's memory against trainings that are measured, and its arithmetic against one by hand."""

import argparse
import json
import math
from concurrent.futures import Future

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from tool_runs import BENCHMARKS, REPOSITORY, TOOLS, call, load_tool, refuse, run

from swinv2_mm.cli.memory import BackboneMemory, MemoryTracker, cuda_casts, cuda_chunks
from swinv2_mm.models import SwinTransformerV2

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('mmaction')

TOOL, BENCHMARK = 'analysis_tools/plan_memory.py', BENCHMARKS / 'benchmark_memory.py'
CONFIGS = REPOSITORY / 'configs'
LEAVES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob('*/*.py') if path.parent.name != '_base_')
VARYING = ('cascade_mask_rcnn', 'objects365')  # train at several sizes
GIB = 2**30


@pytest.fixture(scope='module')
def plan():
    return load_tool(TOOLS / TOOL)


def read(name: str) -> Config:
    return Config.fromfile(CONFIGS / name)


# ---------------------------------------------------------------- the forecast and what is measured


def nano(name: str, samples: int) -> Config:
    """A demo's config that trains in float32, as a machine without a GPU does, and accumulates gradients."""
    cfg = read(name)
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4), accumulative_counts=3)
    cfg.train_dataloader.batch_size = samples
    return cfg


def batch(plan, cfg: Config, model, shape, samples: int) -> dict:
    """Random samples; those of detectors come from mmdet itself."""
    if cfg.default_scope != 'mmdet':
        return plan.random_batch(cfg, shape, samples, model)
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(
        samples, [list(shape)] * samples, [100] * samples, num_classes=3, with_mask=True, with_semantic=True
    )


def measured(plan, cfg: Config, shape: tuple[int, ...], samples: int, bfloat16: bool = False) -> tuple[int, int]:
    """Train some steps for real; returns the bytes that are held between steps, and the peak of a step beside them."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
        optimizer.initialize_count_status(model, 0, 100)
        if bfloat16:  # mmengine's own wrapper for it refuses to run on a CPU
            optimizer.optim_context = lambda _: torch.autocast('cpu', torch.bfloat16)
        *before, last = [batch(plan, cfg, model, shape, samples) for _ in range(5)]
        for data in before:  # the optimizer makes its state in the third step, and the fourth leaves gradients
            model.train_step(data, optim_wrapper=optimizer)
        state = [v for s in optimizer.optimizer.state.values() for v in s.values()]
        gradients = [p.grad for p in model.parameters()]
        with MemoryTracker() as tracker:
            tracker.watch([*model.parameters(), *model.buffers(), *gradients, *state])
            held = tracker.live
            model.train_step(last, optim_wrapper=optimizer)
        return held, tracker.peak - held


@pytest.mark.parametrize(
    ('name', 'size', 'samples', 'backend'),
    [
        pytest.param('det/htc_swinv2_demo.py', [128], 1, 'reference', marks=pytest.mark.slow),
        pytest.param('det/htc_swinv2_demo.py', [128], 1, 'auto', marks=pytest.mark.slow),
        # more samples than the heads are run on
        pytest.param('seg/upernet_swinv2_demo.py', [128], 5, 'auto', marks=pytest.mark.slow),
        ('video/swinv2_demo.py', [8, 64, 64], 4, 'auto'),
    ],
)
def test_the_forecast_is_within_a_tenth_of_what_a_training_takes(plan, name, size, samples, backend):
    cfg = nano(name, samples)
    cfg.model.backbone.attention_backend = backend
    shape = plan.training_shape(cfg, size)
    (state,) = plan.states(plan.count(cfg), 1)
    plain, *_, saved = plan.activations(cfg, shape)
    for row, savers in ((plain, {}), (saved, dict(with_cp=True, sequential_stages=(0, 1)))):
        cfg.model.backbone.update(savers)
        with cuda_chunks():  # the forecast is of a GPU
            held, peak = measured(plan, cfg, shape, samples)
        print(f'{name}, {row.name}: forecast {row.peak / 2**20:.2f} MiB, measured {peak / 2**20:.2f} MiB')
        assert state.total == pytest.approx(held, rel=0.001)
        assert row.peak == pytest.approx(peak, rel=0.1)
    assert saved.peak < 0.75 * plain.peak


@pytest.mark.slow
@pytest.mark.parametrize('name', ['det/htc_swinv2_demo.py', 'seg/upernet_swinv2_demo.py'])
def test_the_forecast_holds_in_mixed_precision(plan, name):
    cfg = nano(name, 2)
    shape = plan.training_shape(cfg, None)
    with cuda_casts(), cuda_chunks():
        _, peak = measured(plan, cfg, shape, 2, bfloat16=True)
    in_float32 = plan.backbone_memory(cfg, shape, 2)
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    plain, *_ = plan.activations(cfg, shape)
    assert plain.peak == pytest.approx(peak, rel=0.1)
    assert sum(plain.backbone.kept) < sum(in_float32.kept)


@pytest.mark.parametrize(('backend', 'rows'), [('auto', 2), ('reference', 4)])
def test_sequential_attention_is_planned_for_the_backend_that_has_it(plan, monkeypatch, backend, rows):
    monkeypatch.setattr(plan, 'heads_memory', lambda *_: 0)
    cfg = read('video/swinv2_demo.py')
    cfg.model.backbone.update(attention_backend=backend, with_cp=False, sequential_stages=(0, 1))
    planned = plan.activations(cfg, plan.training_shape(cfg, [8, 64, 64]))
    assert len({row.name for row in planned}) == len({row.peak for row in planned}) == rows
    assert [row.name for row in planned if row.is_config] == ['none' if backend == 'auto' else 'sequential 1 2']


def test_heads_of_many_samples_grow_in_proportion(plan, monkeypatch):
    cfg = nano('seg/upernet_swinv2_demo.py', 6)
    shape = plan.training_shape(cfg, None)
    outputs = plan.backbone_memory(cfg, shape, 6).outputs
    extrapolated = plan.heads_memory(cfg, shape, 6, outputs)
    monkeypatch.setattr(plan, 'MOST_SAMPLES', 6)
    assert extrapolated == pytest.approx(plan.heads_memory(cfg, shape, 6, outputs), rel=0.02)


# ---------------------------------------------------------------- arithmetic


def counts(plan, **changes):
    """Ten million parameters, eight million of them trained, in blocks of at most one million but for two."""
    sizes = dict(parameters=40e6, trained=32e6, largest_block=4e6, rest=8e6, ema=0, optimizer=64e6)
    return plan.Counts(**sizes | changes)


def test_each_way_to_distribute_holds_what_a_calculation_by_hand_gives(plan):
    """Rajbhandari et al. (2020), Fig. 1: of parameters, gradients and states, 1, 2 or all 3 are divided."""
    by_hand = {
        'DDP': 40e6 + 32e6 + 64e6 + 32e6,
        'ZeRO-1': 40e6 + 32e6 + 8e6,
        'ZeRO-2': 40e6 + 4e6 + 8e6 + (4e6 + 4 * 5e8),
        'FSDP': 5e6 + 4e6 + 8e6 + (2 * (4e6 + 4e6) + 8e6 + 8e6),
    }
    assert {state.name: state.total for state in plan.states(counts(plan), 8)} == by_hand
    averaged = plan.states(counts(plan, ema=40e6), 8)
    assert {state.name: state.total for state in averaged} == {name: total + 40e6 for name, total in by_hand.items()}
    (alone,) = plan.states(counts(plan), 1)
    assert alone.total == 40e6 + 32e6 + 64e6


def test_parameters_are_counted_as_those_of_a_model_with_memory(plan):
    cfg = read('det/htc_swinv2_demo.py')
    cfg.model.backbone.frozen_stages = 1
    found = plan.count(cfg)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks = [block for stage in model.backbone.layers for block in stage.blocks]
    sizes = [sum(p.numel() for p in block.parameters() if p.requires_grad) for block in blocks]
    assert found.trained == 4 * sum(p.numel() for p in trained)
    assert found.parameters == 4 * sum(x.numel() for x in (*model.parameters(), *model.buffers()))
    assert found.optimizer == 2 * found.trained < 2 * found.parameters
    assert (found.largest_block, found.rest) == (4 * max(sizes), found.trained - 4 * sum(sizes))
    assert found.ema == 0
    cfg.custom_hooks = [dict(type='EMAHook')]
    assert plan.count(cfg).ema == found.parameters


def rows(plan, peak: float) -> list:
    memory = BackboneMemory([int(peak)], 0, 0, [])
    return [plan.Activations('none', memory, 0, False), plan.Activations('checkpointing', memory, 0, True)]


def test_the_table_adds_up_and_marks_what_fits_and_what_the_config_has(plan, monkeypatch):
    monkeypatch.setattr(plan, 'count', lambda cfg: counts(plan))
    cfg = read('seg/upernet_swinv2_demo.py')
    text = plan.report(cfg, (3, 128, 128), 8, 12.0, rows(plan, 10 * GIB))
    cells = text[text.index('Total') :].splitlines()[1].split()
    ddp, zero2 = 10 + 1.5 + 168e6 / GIB, 10 + 1.5 + 2056e6 / GIB
    assert cells[:3] == ['none', f'{ddp:.2f}', '+']
    assert f'{zero2:.2f}' in cells
    assert zero2 > 12
    assert cells[cells.index(f'{zero2:.2f}') + 1] != '+'
    marked = [line.split()[0] for line in text.splitlines() if line.endswith('<')]
    assert marked == ['checkpointing', 'DDP', 'checkpointing']


@pytest.mark.parametrize(
    ('base', 'name'),
    [('zero1', 'ZeRO-1'), ('deepspeed_zero2', 'ZeRO-2'), ('deepspeed_zero3', 'FSDP'), ('fsdp', 'FSDP'), (None, 'DDP')],
)
def test_the_way_that_a_config_distributes_is_the_one_that_is_marked(plan, base, name):
    cfg = read('det/htc_swinv2_demo.py')
    if base:
        cfg.merge_from_dict(Config.fromfile(CONFIGS / f'_base_/memory/{base}.py').to_dict())
    assert plan.own_state(cfg) == name


def test_the_peak_is_the_larger_of_the_passes_of_the_backbone_and_of_the_heads_on_what_it_keeps(plan):
    def peak(kept, forward, backward, heads):
        return plan.Activations('', BackboneMemory(kept, forward, backward, []), heads, False).peak

    assert peak([1, 2, 3], 7, 8, 1) == 8
    assert peak([1, 2, 3], 7, 8, 4) == 10
    assert peak([1, 2, 3], 9, 8, 1) == 9


# ---------------------------------------------------------------- configs


def test_the_size_of_every_config_is_known_or_asked_for(plan):
    for name in LEAVES:
        cfg = read(name)
        if any(word in name for word in VARYING) or name == 'video/swinv2_demo.py':
            with pytest.raises(ValueError, match='--shape'):
                plan.training_shape(cfg, None)
        else:
            shape = plan.training_shape(cfg, None)
            assert len(shape) == (5 if name.startswith('video/') else 3), name
            if 'htc_swinv2_' in name and 'demo' not in name:
                assert shape == (3, 1536, 1536), name
        assert plan.own_state(cfg) in ('DDP', 'ZeRO-1', 'ZeRO-2', 'FSDP')
        assert plan._numbers_of_state(cfg) == 2


@pytest.mark.parametrize(
    ('name', 'least', 'most'),
    [
        ('det/htc_swinv2_g.py', 2.9e9, 3.5e9),
        ('det/cascade_mask_rcnn_swinv2_t.py', 80e6, 90e6),
        ('seg/upernet_swinv2_g.py', 2.9e9, 3.5e9),
        ('video/swinv2_g_k400_256x256x8_p244.py', 2.9e9, 3.5e9),
    ],
)
def test_the_parameters_of_each_kind_of_config_are_known(plan, name, least, most):
    found = plan.count(read(name))
    assert least < found.trained / 4 < most
    ddp, *others = plan.states(found, 8)
    assert all(state.parameters + state.gradients + state.optimizer < ddp.total for state in others)


def test_the_size_of_a_training_is_height_then_width(plan):
    cfg = read('video/swinv2_t_k400_224x224x32.py')
    assert plan.training_shape(cfg, None) == (1, 3, 32, 224, 224)
    for step in cfg.train_dataloader.dataset.pipeline:
        if step.get('keep_ratio') is False:
            step.scale = (192, 128)
    assert plan.training_shape(cfg, None) == (1, 3, 32, 128, 192)
    cfg = read('seg/upernet_swinv2_l.py')
    cfg.model.data_preprocessor.size = (96, 160)
    assert plan.training_shape(cfg, None) == (3, 96, 160)
    cfg = read('det/htc_swinv2_demo.py')
    assert plan.training_shape(cfg, None) == (3, 128, 128)
    cfg.train_dataloader.dataset.pipeline[2].scale = (160, 96)
    assert plan.training_shape(cfg, None) == (3, 96, 160)
    assert plan.training_shape(cfg, [64, 32]) == (3, 64, 32)


# ---------------------------------------------------------------- wrong inputs, and the command line


@pytest.mark.parametrize(
    ('arguments', 'changes', 'text'),
    [
        (dict(gpus=0), {}, '--gpus must be at least 1, got 0'),
        (dict(gpu_mem=0), {}, '--gpu-mem must be more than 0, got 0'),
        (dict(shape=[1, 2, 3]), {}, '--shape of an image takes one or two numbers'),
        ({}, {'default_scope': 'mmpose'}, "default_scope of the config must be one of .*, got 'mmpose'"),
        ({}, {'model.backbone.type': 'ResNet'}, "a backbone of swinv2_mm, got 'ResNet'"),
        ({}, {'model.backbone.window_size': 0}, 'window_size of stage 0 must be a number of at least 1'),
        ({}, {'optim_wrapper.optimizer.type': 'Lion'}, "the state of 'Lion' is not known; known are Adam, AdamW"),
    ],
)
def test_what_is_wrong_is_named(plan, arguments, changes, text):
    cfg = read('seg/upernet_swinv2_demo.py')
    cfg.merge_from_dict(changes)
    args = argparse.Namespace(**dict(gpus=8, gpu_mem=40.0, shape=None) | arguments)
    with pytest.raises(ValueError, match=text):
        plan.check(args, cfg)


DEMO = [CONFIGS / 'video/swinv2_demo.py', '--gpus', '4', '--shape', '8', '64', '64']


def check_plan(printed):
    assert '8 x 1 3 8 64 64 on each of 4 GPUs of 40 GiB, bfloat16' in printed
    assert printed.count(' <\n') == 3


def test_a_plan_is_printed(tmp_path):
    check_plan(call(tmp_path, TOOL, *DEMO))


def test_configs_that_cannot_be_planned_give_one_line(tmp_path):
    assert 'the config trains at sizes that vary' in refuse(
        tmp_path, TOOL, CONFIGS / 'det/cascade_mask_rcnn_swinv2_t.py'
    )
    assert refuse(tmp_path, TOOL, 'no.py').startswith('error: config no.py does not ')


@pytest.mark.slow
def test_a_plan_is_printed_in_any_folder(tmp_path):
    check_plan(run(tmp_path, TOOL, *DEMO))


# ---------------------------------------------------------------- the benchmark of memory


@pytest.fixture(scope='module')
def benchmark():
    return load_tool(BENCHMARK)


def test_the_slope_is_the_power_of_the_pixels(benchmark):
    rows = [dict(task='training', side=side, seconds=side**2 / 7, bytes=3.0 * side**4) for side in (64, 96, 128)]
    rows.append(dict(task='inference', side=64, seconds=1.0, bytes=1.0))
    assert benchmark.slope(rows, 'training', 'seconds') == pytest.approx(1)
    assert benchmark.slope(rows, 'training', 'bytes') == pytest.approx(2)


SAVERS = ('none', 'sequential', 'checkpointing', 'both', 'sdpa', 'sdpa + checkpointing')


@pytest.fixture(scope='module')
def forecasts(benchmark):
    """Peaks of a small backbone by saver, and what makes one."""

    def make(saver):
        return lambda: benchmark.build(dict(embed_dims=32, depths=(1, 2), num_heads=(1, 2)), 4, saver)

    return {saver: (benchmark.forecast(make(saver), 64, gpu=False), make(saver)) for saver in SAVERS}


@pytest.mark.parametrize('saver', SAVERS)
def test_the_forecast_of_the_benchmark_is_what_it_measures(benchmark, forecasts, saver):
    forecast, make = forecasts[saver]
    torch.manual_seed(0)
    for _ in range(2):  # the first one makes the indices of the windows, which stay for all models
        measured = benchmark.measured_peak(*benchmark.ready(make(), 64))
    assert measured == forecast


def test_each_saver_takes_less_memory_than_none(forecasts):
    peaks = {saver: peak for saver, (peak, _) in forecasts.items()}
    assert max(peaks, key=peaks.get) == 'none'
    assert len(set(peaks.values())) == len(peaks)


def test_a_part_is_the_block_of_swinv2_g(benchmark):
    """The stage's channels, heads and map, as the whole network has them."""
    with torch.device('meta'):
        whole = SwinTransformerV2('giant', window_size=32)
        for stage, name in ((0, 'block of stage 1'), (2, 'block of stage 3')):
            (block,) = benchmark.part(name, 'none').layers[0].blocks
            expected = whole.layers[stage].blocks[0]
            assert [(n, p.shape) for n, p in block.named_parameters()] == [
                (n, p.shape) for n, p in expected.named_parameters()
            ]
            assert benchmark.PARTS[name][1] == 4 * 2**stage


@pytest.mark.parametrize(
    ('changes', 'error', 'text'),
    [
        (dict(repeats=0), ValueError, '--repeats must be at least 1, got 0'),
        (dict(window=0), ValueError, '--window must be at least 1, got 0'),
        (dict(sizes=[64, 64]), ValueError, '--sizes must be at least two different positive numbers'),
        (dict(plot='a.png'), ValueError, '--plot draws the figures of --task sizes, not of --task savers'),
        (dict(task='full'), ValueError, '--task full needs a GPU'),
        (dict(savers=['sdpa', 'triton']), ValueError, '--savers triton needs a GPU'),
        (dict(resume=True), ValueError, '--resume needs --json'),
        (dict(json='/no/where/a.json'), FileNotFoundError, 'there is no folder /no/where for a.json'),
    ],
)
def test_wrong_arguments_of_the_benchmark_are_named(benchmark, monkeypatch, changes, error, text):
    monkeypatch.setattr(benchmark, 'DEVICE', 'cpu')
    args = dict(task='savers', savers=None, repeats=1, window=8, sizes=[64, 128], json=None, resume=False, plot=None)
    with pytest.raises(error, match=text):
        benchmark.check(argparse.Namespace(**args | changes))


def test_savers_that_were_measured_are_not_measured_again(benchmark, monkeypatch):
    class Here:
        """Runs in this process what else gets one of its own."""

        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, *args):
            measured.append(args[1])
            future = Future()
            future.set_result(function(*args))
            return future

    measured, kept = [], []
    monkeypatch.setattr(benchmark, 'DEVICE', 'cpu')
    monkeypatch.setattr(benchmark, 'G_SIZE', 64)
    monkeypatch.setattr(benchmark, 'ProcessPoolExecutor', Here)
    rows = [dict(part='nano', saver='sdpa', size=64, seconds=1.0)]
    benchmark.savers(benchmark.TASKS['nano'], ['sdpa', 'both'], 1, rows, lambda rows: kept.append(list(rows)))
    assert measured == ['both']
    assert [row['saver'] for row in rows] == ['sdpa', 'both']
    assert len(kept[0]) == 2
    assert rows[1]['tracked'] == rows[1]['forecast'] > 0
    assert rows[1]['seconds'] > 0


SIZES = ['--task', 'sizes', '--window', '8', '--repeats', '1', '--json', 'out.json', '--plot', 'out.png', '--sizes']


def check_sizes(folder, printed, *sides):
    rows = json.loads((folder / 'out.json').read_text())
    expected = [(task, side) for task in ('inference', 'training') for side in sides]
    assert [(row['task'], row['side']) for row in rows] == expected
    small, large = (row['bytes'] for row in rows[2:])
    power = math.log(large / small) / math.log(sides[1] ** 2 / sides[0] ** 2)
    assert 'training grows with: seconds' in printed
    assert f'bytes {power:.2f}' in printed
    assert cv2.imread(str(folder / 'out.png')).std() > 1
    return power


def test_time_and_memory_of_growing_inputs_are_printed_written_and_drawn(tmp_path):
    check_sizes(tmp_path, call(tmp_path, BENCHMARK, *SIZES, '32', '64'), 32, 64)


@pytest.mark.slow
def test_memory_of_training_grows_with_the_pixels(tmp_path):
    assert 0.8 < check_sizes(tmp_path, run(tmp_path, BENCHMARK, *SIZES, '256', '384'), 256, 384) < 1.1
