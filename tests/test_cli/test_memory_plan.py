"""Planned memory compared with real trainings, and its arithmetic with a calculation by hand."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from nano import CHANNELS, starting_points
from tool_runs import REPOSITORY

from swinv2_mm.cli import inputs, memory_plan
from swinv2_mm.cli.memory import BackboneMemory, MemoryTracker, cuda_casts, cuda_chunks

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('mmaction')

CONFIGS = REPOSITORY / 'configs'
LEAVES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob('*/*.py') if path.parent.name != '_base_')
VARYING = ('cascade_mask_rcnn', 'objects365', 'dino', 'faster_rcnn', 'retinanet')  # train at several sizes
GIB = 2**30


def read(name: str) -> Config:
    return Config.fromfile(CONFIGS / name)


# ---------------------------------------------------------------- planned memory and measured memory


def nano(name: str, samples: int) -> Config:
    """The config of a demo with training in float32, as on a machine without a GPU, and gradient accumulation."""
    cfg = read(name)
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4), accumulative_counts=3)
    cfg.train_dataloader.batch_size = samples
    return cfg


def batch(cfg: Config, model, shape, samples: int) -> dict:
    """Random samples; those of detectors come from mmdet itself."""
    if cfg.default_scope != 'mmdet':
        return inputs.random_batch(cfg, shape, samples, model)
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(
        samples, [list(shape)] * samples, [100] * samples, num_classes=3, with_mask=True, with_semantic=True
    )


def measured(cfg: Config, shape: tuple[int, ...], samples: int, bfloat16: bool = False) -> tuple[int, int]:
    """Run some training steps; returns the bytes alive between steps, and the additional peak of a step."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
        optimizer.initialize_count_status(model, 0, 100)
        if bfloat16:  # AmpOptimWrapper refuses to run on a CPU
            optimizer.optim_context = lambda _: torch.autocast('cpu', torch.bfloat16)
        *before, last = [batch(cfg, model, shape, samples) for _ in range(5)]
        for data in before:  # the optimizer state is created in the third step, and the fourth one leaves gradients
            model.train_step(data, optim_wrapper=optimizer)
        state = [v for s in optimizer.optimizer.state.values() for v in s.values()]
        gradients = [p.grad for p in model.parameters()]
        with MemoryTracker() as tracker:
            tracker.watch([*model.parameters(), *model.buffers(), *gradients, *state])
            static = tracker.live
            model.train_step(last, optim_wrapper=optimizer)
        return static, tracker.peak - static


@pytest.mark.parametrize(
    ('name', 'size', 'samples', 'backend'),
    [
        pytest.param('det/htc_swinv2_demo.py', [128], 1, 'reference', marks=pytest.mark.slow),
        pytest.param('det/htc_swinv2_demo.py', [128], 1, 'auto', marks=pytest.mark.slow),
        # more samples than MAX_HEAD_SAMPLES
        pytest.param('seg/upernet_swinv2_demo.py', [128], 5, 'auto', marks=pytest.mark.slow),
        ('video/swinv2_demo.py', [8, 64, 64], 4, 'auto'),
        ('cls/swinv2_demo.py', [64], 4, 'auto'),
        pytest.param('ssl/simmim_swinv2_demo.py', [64], 4, 'auto', marks=pytest.mark.slow),
    ],
)
def test_activations_of_a_real_training(name, size, samples, backend):
    cfg = nano(name, samples)
    cfg.model.backbone.attention_backend = backend
    shape = inputs.training_shape(cfg, size)
    (state,) = memory_plan.model_states(memory_plan.model_size(cfg), 1)
    plain, *_, saved = memory_plan.activations(cfg, shape)
    for row, techniques in ((plain, {}), (saved, dict(with_cp=True, sequential_stages=(0, 1)))):
        cfg.model.backbone.update(techniques)
        with cuda_chunks():  # the plan is for a GPU
            static, peak = measured(cfg, shape, samples)
        print(f'{name}, {row.name}: planned {row.peak / 2**20:.2f} MiB, measured {peak / 2**20:.2f} MiB')
        assert state.total == pytest.approx(static, rel=0.001)
        assert row.peak == pytest.approx(peak, rel=0.1)
    assert saved.peak < 0.75 * plain.peak


@pytest.mark.slow
@pytest.mark.parametrize('name', ['det/htc_swinv2_demo.py', 'seg/upernet_swinv2_demo.py'])
def test_activations_of_a_real_training_in_mixed_precision(name):
    cfg = nano(name, 2)
    shape = inputs.training_shape(cfg, None)
    with cuda_casts(), cuda_chunks():
        _, peak = measured(cfg, shape, 2, bfloat16=True)
    in_float32 = memory_plan.backbone_memory(cfg, shape, 2)
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    plain, *_ = memory_plan.activations(cfg, shape)
    assert plain.peak == pytest.approx(peak, rel=0.1)
    assert sum(plain.backbone.kept) < sum(in_float32.kept)


@pytest.mark.parametrize(('backend', 'rows'), [('auto', 2), ('reference', 4)])
def test_activations_rows_of_sequential_attention(monkeypatch, backend, rows):
    monkeypatch.setattr(memory_plan, 'heads_memory', lambda *_: 0)
    cfg = read('video/swinv2_demo.py')
    cfg.model.backbone.update(attention_backend=backend, with_cp=False, sequential_stages=(0, 1))
    planned = memory_plan.activations(cfg, inputs.training_shape(cfg, [8, 64, 64]))
    assert len({row.name for row in planned}) == len({row.peak for row in planned}) == rows
    assert [row.name for row in planned if row.is_config] == ['none' if backend == 'auto' else 'sequential 1 2']


def test_heads_memory_of_mask2former_includes_its_masks():
    cfg = starting_points.shrink(read('det/mask2former_swinv2_l_panoptic.py'))
    outputs = [
        torch.empty(1, c, 64 // s, 64 // s, device='meta') for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)
    ]
    assert memory_plan.heads_memory(cfg, (3, 64, 64), 1, outputs) > inputs.OBJECTS * 64 * 64


def test_heads_memory_is_extrapolated_linearly_in_the_batch_size(monkeypatch):
    cfg = nano('seg/upernet_swinv2_demo.py', 6)
    shape = inputs.training_shape(cfg, None)
    outputs = memory_plan.backbone_memory(cfg, shape, 6).outputs
    extrapolated = memory_plan.heads_memory(cfg, shape, 6, outputs)
    monkeypatch.setattr(memory_plan, 'MAX_HEAD_SAMPLES', 6)
    assert extrapolated == pytest.approx(memory_plan.heads_memory(cfg, shape, 6, outputs), rel=0.02)


# ---------------------------------------------------------------- arithmetic


def size(**changes):
    """Ten million parameters: eight million are trained, two of them outside of blocks of up to one million."""
    sizes = dict(parameters=40e6, trained=32e6, largest_block=4e6, rest=8e6, ema=0, optimizer=64e6)
    return memory_plan.ModelSize(**sizes | changes)


def test_model_states_by_hand():
    """Rajbhandari et al. (2020), Fig. 1: of parameters, gradients and states, 1, 2 or all 3 are divided."""
    by_hand = {
        'DDP': 40e6 + 32e6 + 64e6 + 32e6,
        'ZeRO-1': 40e6 + 32e6 + 8e6,
        'ZeRO-2': 40e6 + 4e6 + 8e6 + (4e6 + 4 * 5e8),
        'FSDP': 5e6 + 4e6 + 8e6 + (2 * (4e6 + 4e6) + 8e6 + 8e6),
    }
    assert {state.name: state.total for state in memory_plan.model_states(size(), 8)} == by_hand
    with_ema = memory_plan.model_states(size(ema=40e6), 8)
    assert {state.name: state.total for state in with_ema} == {name: total + 40e6 for name, total in by_hand.items()}
    (single,) = memory_plan.model_states(size(), 1)
    assert single.total == 40e6 + 32e6 + 64e6


def test_model_size_is_that_of_the_built_model():
    cfg = read('det/htc_swinv2_demo.py')
    cfg.model.backbone.frozen_stages = 1
    found = memory_plan.model_size(cfg)
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
    assert memory_plan.model_size(cfg).ema == found.parameters


@pytest.mark.parametrize(
    ('base', 'name'),
    [('zero1', 'ZeRO-1'), ('deepspeed_zero2', 'ZeRO-2'), ('deepspeed_zero3', 'FSDP'), ('fsdp', 'FSDP'), (None, 'DDP')],
)
def test_configured_strategy(base, name):
    cfg = read('det/htc_swinv2_demo.py')
    if base:
        cfg.merge_from_dict(Config.fromfile(CONFIGS / f'_base_/memory/{base}.py').to_dict())
    assert memory_plan.configured_strategy(cfg) == name


def test_activations_peak_is_the_largest_phase():
    def peak(kept, forward, backward, heads):
        return memory_plan.Activations('', BackboneMemory(kept, forward, backward, []), heads, False).peak

    assert peak([1, 2, 3], 7, 8, 1) == 8
    assert peak([1, 2, 3], 7, 8, 4) == 10
    assert peak([1, 2, 3], 9, 8, 1) == 9


# ---------------------------------------------------------------- configs


def test_training_shape_of_every_config():
    for name in LEAVES:
        cfg = read(name)
        if any(word in name for word in VARYING) or name == 'video/swinv2_demo.py':
            with pytest.raises(ValueError, match='--shape'):
                inputs.training_shape(cfg, None)
        else:
            shape = inputs.training_shape(cfg, None)
            assert len(shape) == (5 if name.startswith('video/') else 3), name
            if 'htc_swinv2_' in name and 'demo' not in name:
                assert shape == (3, 1536, 1536), name
        assert memory_plan.configured_strategy(cfg) in ('DDP', 'ZeRO-1', 'ZeRO-2', 'FSDP')
        assert memory_plan.optimizer_slots(cfg) == 2


@pytest.mark.parametrize(
    ('name', 'least', 'most'),
    [
        ('det/htc_swinv2_g.py', 2.9e9, 3.5e9),
        ('det/cascade_mask_rcnn_swinv2_t.py', 80e6, 90e6),
        ('seg/upernet_swinv2_g.py', 2.9e9, 3.5e9),
        ('video/swinv2_g_k400_256x256x8_p244.py', 2.9e9, 3.5e9),
    ],
)
def test_model_size_of_each_kind_of_config(name, least, most):
    found = memory_plan.model_size(read(name))
    assert least < found.trained / 4 < most
    ddp, *others = memory_plan.model_states(found, 8)
    assert all(state.parameters + state.gradients + state.optimizer < ddp.total for state in others)


def packed(step: dict) -> tuple[int, ...]:
    """Shape of a larger image after a transform of mmpretrain."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        transforms = [
            TRANSFORMS.build(dict(config, _scope_='mmpretrain')) for config in (step, dict(type='PackInputs'))
        ]
    results = dict(img=np.zeros((50, 60, 3), np.uint8), img_shape=(50, 60), ori_shape=(50, 60))
    for transform in transforms:
        results = transform(results)
    return tuple(results['inputs'].shape)


def test_training_shape_is_height_then_width():
    cfg = read('video/swinv2_t_k400_224x224x32.py')
    assert inputs.training_shape(cfg, None) == (1, 3, 32, 224, 224)
    for step in cfg.train_dataloader.dataset.pipeline:
        if step.get('keep_ratio') is False:
            step.scale = (192, 128)
    assert inputs.training_shape(cfg, None) == (1, 3, 32, 128, 192)
    cfg = read('seg/upernet_swinv2_l.py')
    cfg.model.data_preprocessor.size = (96, 160)
    assert inputs.training_shape(cfg, None) == (3, 96, 160)
    cfg = read('cls/swinv2_demo.py')
    sizes = {
        (3, 32, 32): dict(type='RandomResizedCrop', scale=32),
        (3, 24, 32): dict(type='RandomResizedCrop', scale=(24, 32)),
        (3, 20, 32): dict(type='RandomCrop', crop_size=(20, 32), padding=4),
        (3, 16, 32): dict(type='Resize', scale=(32, 16)),
        (3, 12, 32): dict(type='CenterCrop', crop_size=(32, 12)),
    }
    for shape, step in sizes.items():
        cfg.train_dataloader.dataset.pipeline = [dict(type='RandomCrop', crop_size=8), step, dict(type='PackInputs')]
        assert inputs.training_shape(cfg, None) == shape
        assert packed(step) == shape
    cfg = read('det/htc_swinv2_demo.py')
    assert inputs.training_shape(cfg, None) == (3, 128, 128)
    cfg.train_dataloader.dataset.pipeline[2].scale = (160, 96)
    assert inputs.training_shape(cfg, None) == (3, 96, 160)
    assert inputs.training_shape(cfg, [64, 32]) == (3, 64, 32)
