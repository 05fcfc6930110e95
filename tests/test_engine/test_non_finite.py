"""The hook that ends a training at a loss or gradient that is not finite."""

import importlib.util
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import DATASETS, HOOKS, MODELS, OPTIM_WRAPPERS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from nano import training
from processes import run_processes
from torch import nn
from torch.utils.data import Dataset

from swinv2_mm.engine.non_finite import to_data

HOOK = dict(type='swinv2_mm.TerminateOnNonFiniteHook')
DEEPSPEED = [f'deepspeed_zero{stage}' for stage in (1, 2, 3)] if importlib.util.find_spec('deepspeed') else []


# ---------------------------------------------------------------- a training of four iterations


@DATASETS.register_module()
class NumberedFiles(Dataset):
    """Samples of 0.png to 7.png; one of them may have a value that is not finite."""

    def __init__(self, bad: int | None = None, value: float = math.nan):
        self.bad, self.value = bad, value

    def __len__(self):
        return 8

    def __getitem__(self, index):
        inputs = torch.full((4,), 1.0 + index)
        if index == self.bad:
            inputs[2] = self.value
        return dict(inputs=inputs, data_samples=BaseDataElement(metainfo=dict(img_path=f'{index}.png')))


@MODELS.register_module()
class ThreeLayers(BaseModel):
    """A model whose gradients before its last layer are multiplied by a factor in some iterations."""

    def __init__(self, iterations: list[int], factor: float):
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.iterations, self.factor, self.calls = iterations, factor, 0

    def forward(self, inputs, data_samples=None, mode='tensor'):
        x = self.second(self.first(torch.stack(inputs)))
        self.calls += 1
        if self.calls in self.iterations and x.requires_grad:
            x.register_hook(lambda grad: grad * self.factor)
        loss = self.last(x).square().mean()
        # two losses, and an accuracy, which may be NaN
        return dict(loss_cls=[loss, loss], loss_box=self.last.weight.square().mean(), acc=loss.detach() * math.nan)


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's wrapper with its loss scaler and without autocast, for a CPU."""

    optim_context = OptimWrapper.optim_context

    def __init__(self, dtype, init_scale, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=init_scale)
        self.cast_dtype, self._scale_update_param = getattr(torch, dtype), None


@HOOKS.register_module()
class RememberWeights(Hook):
    """Has the weights before the last iteration that was started."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.weights = [p.clone() for p in runner.model.parameters()]


def make_runner(work_dir, bad=None, value=math.nan, iterations=(), factor=math.nan, keep_batch=False, **wrapper):
    cfg = dict(
        model=dict(type='ThreeLayers', iterations=list(iterations), factor=factor),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=dict(type='NumberedFiles', bad=bad, value=value),
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3), **wrapper),
        custom_hooks=[dict(type='RememberWeights'), dict(HOOK, keep_batch=keep_batch)],
        log_level='ERROR',
        experiment_name=f'{work_dir.name}-{time.time()}',
    )
    return Runner.from_cfg(Config(cfg))


def fail(runner):
    """Train until the hook ends it, without an update of the weights; returns the message."""
    with pytest.raises(FloatingPointError) as error:
        runner.train()
    before = next(hook.weights for hook in runner.hooks if isinstance(hook, RememberWeights))
    assert all(map(torch.equal, runner.model.parameters(), before))
    return str(error.value).removeprefix('a loss or gradient of ')


WRAPPERS = pytest.mark.parametrize(
    'wrapper',
    [
        pytest.param({}, id='plain'),
        pytest.param(dict(clip_grad=dict(max_norm=1.0)), id='clip'),
        pytest.param(dict(accumulative_counts=4), id='accumulate'),
    ],
)


@WRAPPERS
@pytest.mark.parametrize(('value', 'loss'), [(math.nan, 'nan'), (1e30, 'inf')])
def test_terminate_at_a_loss(tmp_path, wrapper, value, loss):
    message = fail(make_runner(tmp_path, bad=5, value=value, **wrapper))
    assert message == f'iteration 3 is not finite: loss_cls is {loss}, in the batch 4.png, 5.png'
    assert message in next(tmp_path.glob('*/*.log')).read_text()


@WRAPPERS
@pytest.mark.parametrize('factor', [math.nan, math.inf])
def test_terminate_at_a_gradient(tmp_path, wrapper, factor):
    """Four parameters are before the factor; clipping would make the gradients of the others NaN too."""
    message = fail(make_runner(tmp_path, iterations=[2], factor=factor, **wrapper))
    value = 'nan' if math.isnan(factor) else '-?inf'
    line = f'the gradient of second.bias is {value}, as are 3 more, in the batch 2.png, 3.png'
    line = f'iteration 2 is not finite: {line}'
    assert re.fullmatch(line, message), message


def test_finite_training_goes_on(tmp_path):
    """Also if only the norm of the gradients overflows; afterwards the hook has left the model and the optimizer."""
    runner = make_runner(tmp_path, iterations=[4], factor=1e30)
    runner.train()
    assert runner.iter == 4
    assert 'backward' not in vars(runner.optim_wrapper)
    assert not runner.model._forward_hooks


@HOOKS.register_module()
class Interrupt(Hook):
    """Ctrl-C in the third iteration."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 2:
            raise KeyboardInterrupt


def test_train_again_in_one_process(tmp_path):
    """After an error the hook and the gradients are removed; after Ctrl-C, at the start of the next training."""
    runner = make_runner(tmp_path, iterations=[2, 5])
    assert fail(runner).startswith('iteration 2 is not finite: the gradient of second.bias is nan')
    assert 'backward' not in vars(runner.optim_wrapper)
    assert not runner.model._forward_hooks
    assert all(p.grad is None for p in runner.model.parameters())
    runner.register_hook(dict(type='Interrupt'))
    with pytest.raises(KeyboardInterrupt):
        runner.train()  # iterations 2 and 3
    # the fifth call of the model
    assert fail(runner).startswith('iteration 3 is not finite: the gradient of second.bias is nan')
    assert not runner.model._forward_hooks


@HOOKS.register_module()
class Unfreeze(Hook):
    """The first layer is frozen until the second iteration."""

    def before_train(self, runner):
        runner.model.first.requires_grad_(False)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        runner.model.first.requires_grad_(batch_idx > 0)


def test_parameters_that_are_unfrozen_later(tmp_path):
    runner = make_runner(tmp_path, iterations=[2])
    runner.register_hook(dict(type='Unfreeze'), priority='VERY_HIGH')
    assert 'the gradient of second.bias is nan, as are 3 more' in fail(runner)


def test_fp16_skips_infinite_gradients(tmp_path):
    scaled = dict(type='CpuAmpOptimWrapper', dtype='float16', init_scale=65536.0)
    runner = make_runner(tmp_path, iterations=[1, 3], factor=math.inf, **scaled)
    runner.train()
    assert runner.optim_wrapper.loss_scaler.get_scale() == 65536 / 4
    assert runner.iter == 4


@pytest.mark.parametrize(
    ('kwargs', 'line'),
    [
        (dict(dtype='float16', bad=1), 'iteration 1 is not finite: loss_cls is nan'),
        # a scale of 1 is not the cause
        (
            dict(dtype='float16', init_scale=2.0, iterations=[1, 2]),
            'iteration 2 is not finite: the gradient of second.bias is nan',
        ),
        (dict(dtype='bfloat16', iterations=[1]), 'iteration 1 is not finite: the gradient of second.bias is nan'),
    ],
)
def test_terminate_in_mixed_precision(tmp_path, kwargs, line):
    kwargs = dict(dict(init_scale=65536.0), **kwargs)
    assert fail(make_runner(tmp_path, type='CpuAmpOptimWrapper', **kwargs)).startswith(line)


def test_kept_batch_reproduces_the_loss(tmp_path):
    runner = make_runner(tmp_path, bad=5, keep_batch=True)
    path = tmp_path / 'non_finite_iter_3_rank_0.pth'
    assert fail(runner).endswith(f'in the batch 4.png, 5.png; kept in {path}')
    batch = torch.load(path, weights_only=True)
    assert batch['data_samples'] == [dict(metainfo=dict(img_path=f'{i}.png')) for i in (4, 5)]
    assert runner.model(**batch, mode='loss')['loss_cls'][0].isnan()
    batch['inputs'][1][2] = 0
    assert runner.model(**batch, mode='loss')['loss_cls'][0].isfinite()


def test_to_data_of_a_detector(tmp_path):
    """Boxes, masks and labels of mmdet, numbers of NumPy, and a view of a large tensor."""
    structures = pytest.importorskip('mmdet.structures')
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks, PolygonMasks
    from mmengine.structures import InstanceData

    sample = structures.DetDataSample(metainfo=dict(img_path=Path('a.jpg'), scale_factor=np.array([0.5, 2.0])))
    bitmaps = np.array([[[1, 0], [0, 1]]], np.uint8)
    sample.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(torch.tensor([[0.0, 1, 2, 3]])),
        masks=BitmapMasks(bitmaps, 2, 2),
        labels=torch.tensor([7]),
    )
    sample.ignored_instances = InstanceData(masks=PolygonMasks([[np.array([0.0, 0, 4, 0, 4, 4, 0, 4])]], 4, 4))
    batch = dict(inputs=[torch.zeros(1000)[:2]], data_samples=(sample,), kind=np.str_('x'), number=np.float64(2))
    torch.save(to_data(batch), tmp_path / 'batch.pth')
    assert (tmp_path / 'batch.pth').stat().st_size < 4000
    loaded = torch.load(tmp_path / 'batch.pth', weights_only=True)
    (entries,) = loaded.pop('data_samples')
    assert entries['metainfo']['img_path'] == 'a.jpg'
    assert entries['metainfo']['scale_factor'].tolist() == [0.5, 2]
    assert {k: v.tolist() for k, v in entries['gt_instances'].items() if k != 'metainfo'} == dict(
        bboxes=[[0, 1, 2, 3]], masks=bitmaps.tolist(), labels=[7]
    )
    assert entries['ignored_instances']['masks'].shape == (1, 4, 4)
    assert loaded.pop('inputs')[0].tolist() == [0, 0]
    assert loaded == dict(kind='x', number=2)


# ---------------------------------------------------------------- two processes


@DATASETS.register_module()
class BadPixels(training.Pixels):
    """The second batch of the second process has a target that is NaN."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return dict(item, target=item['target'] * math.nan) if index == 3 else item


@HOOKS.register_module()
class SpoilGradient(Hook):
    """In the second batch of the second process, the gradient of the head's output is NaN."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 1 and get_rank() == 1:
            runner.model.module.head.register_forward_hook(spoil)


def spoil(module, args, out):
    out.register_hook(lambda grad: grad * math.nan)


def fail_at_a_loss(folder: Path, data: Path, strategies: list[str]) -> None:
    for strategy in strategies:
        cfg = training.config(folder / strategy, data, strategy)
        cfg.train_dataloader.dataset.type = 'BadPixels'
        fail_together(cfg, 'loss is nan, in the batch (the pipeline names no files', kept=[1])


def fail_at_a_gradient(folder: Path, data: Path, strategies: list[str]) -> None:
    for strategy in strategies:
        cfg = training.config(folder / strategy, data, strategy)
        cfg.custom_hooks.append(dict(type='SpoilGradient'))
        fail_together(cfg, 'the gradient of head.bias is nan, as are ', kept=[0, 1])


def fail_together(cfg: Config, cause: str, kept: list[int]) -> None:
    """Each process ends with the same message, and those whose batch may be the cause keep it."""
    cfg.custom_hooks.append(dict(HOOK, keep_batch=True))
    with pytest.raises(FloatingPointError) as error:
        training.train(cfg)
    assert f'iteration 2 is not finite: {cause}' in str(error.value)
    names = [f'non_finite_iter_2_rank_{rank}.pth' for rank in kept]
    assert str(error.value).endswith('; kept in ' + ', '.join(f'{cfg.work_dir}/{name}' for name in names))
    assert sorted(path.name for path in Path(cfg.work_dir).glob('non_finite*')) == names


def test_all_processes_terminate_at_the_loss_of_one(tmp_path):
    data = training.write_start(tmp_path)
    run_processes(fail_at_a_loss, tmp_path, data, ['ddp'], folder=tmp_path)


def test_all_processes_terminate_at_a_gradient(tmp_path):
    data = training.write_start(tmp_path)
    run_processes(fail_at_a_gradient, tmp_path, data, ['zero1', 'fsdp'], folder=tmp_path)


@pytest.mark.slow
def test_all_processes_of_deepspeed_terminate_at_the_loss_of_one(tmp_path):
    data = training.write_start(tmp_path)
    run_processes(fail_at_a_loss, tmp_path, data, DEEPSPEED, folder=tmp_path)
