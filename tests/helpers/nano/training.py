"""Trainings of a nano model on one or several processes without randomness: all of them must agree.

The model is smooth: another order of summation changes a training only by rounding, where a detector would select
other proposals. One process trains on the joint batch of several: it takes their images one by one and accumulates the
gradients.
"""

import importlib
import os
import signal
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, get_rank
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, MODELS
from torch import nn
from torch.utils.data import Dataset

import swinv2_mm  # noqa: F401
from swinv2_mm.checkpoints.files import read_checkpoint
from swinv2_mm.cli import launch

MEMORY = Path(__file__).parents[3] / 'configs/_base_/memory'
START = 'start.pth'
IMAGES = 8
STEPS, SAVED, LR_DECAY = 6, 4, 5  # of the optimizer; until the first checkpoint; until the learning rate decays
ARCH = dict(embed_dims=16, depths=(1, 1), num_heads=(1, 2))


@MODELS.register_module()
class NanoModel(BaseModel):
    """A backbone of two blocks and a head that predicts three numbers."""

    def __init__(self, backbone: dict):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = nn.Conv2d(32, 32, 1)
        self.other_head = nn.Linear(32, 3)
        self.nothing = nn.Identity()
        self.threshold = 0.0

    def forward(self, inputs, mode='tensor', target=None):
        """As in detectors, the modules that run depend on the image, and in prediction on the threshold too."""
        x = self.head(self.backbone(torch.stack(inputs))[-1]).mean((2, 3))
        if mode == 'loss':
            target = torch.stack(target)
            if target[0, 0] > 0:
                x = self.nothing(x)
            return dict(loss=(self.other_head(x) - target).square().sum())
        return [self.other_head(x) if self.threshold < 1 else x]


@DATASETS.register_module()
class Pixels(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(IMAGES, 3, 32, 32, generator=generator)
        self.targets = torch.randn(IMAGES, 3, generator=generator)
        self.metainfo = {}

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        return dict(inputs=self.images[index], target=self.targets[index])


def write_start(folder: Path) -> Path:
    """Write the initial weights of all trainings."""
    torch.manual_seed(0)
    model = MODELS.build(config(folder, folder).model)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, std=0.3)  # those of new blocks are 0, which stops gradients
    torch.save(dict(state_dict=model.state_dict()), folder / START)
    return folder


def config(folder: Path, data: Path, strategy: str = 'ddp', accumulate: int = 1, steps: int = STEPS) -> Config:
    """The training of the nano model with what `configs/_base_/memory/{strategy}.py` adds, or nothing for 'ddp'.

    Args:
        folder: Where checkpoints and logs go.
        data: Folder with the file of `write_start`.
        strategy: Name of a config of `configs/_base_/memory`.
        accumulate: Iterations per step of the optimizer.
        steps: Steps of the optimizer.
    """
    backbone = dict(type='swinv2_mm.SwinTransformerV2', arch=ARCH, window_size=4)
    cfg = Config(
        dict(
            model=dict(
                type='NanoModel',
                backbone=dict(backbone, pretrained_window_sizes=4, out_indices=(1,), drop_path_rate=0.0),
            ),
            train_dataloader=dict(dataset=dict(type='Pixels')),
            optim_wrapper=dict(type='AmpOptimWrapper', dtype='bfloat16', optimizer=dict(type='AdamW')),
            default_hooks=dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook')),
            custom_hooks=[dict(type='swinv2_mm.ReproducibleResumeHook')],
            log_level='WARNING',
        )
    )
    prepare(cfg, folder, data, strategy, accumulate, steps)
    cfg.optim_wrapper.optimizer.lr = 1e-3
    if 'zero3' in strategy:  # all parameters are below the default, and would not be sharded
        cfg.strategy.zero_optimization.stage3_param_persistence_threshold = 100
    return cfg


def prepare(cfg: Config, folder: Path, data: Path, strategy: str, accumulate: int, steps: int) -> None:
    """Set what all trainings share: AdamW, gradient clipping, layer-wise learning rates, a schedule."""
    if strategy != 'ddp':
        cfg.merge_from_dict(Config.fromfile(MEMORY / f'{strategy}.py').to_dict())
    cfg.work_dir, cfg.experiment_name = str(folder), folder.name
    cfg.train_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=False)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps * accumulate, val_interval=10**6)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.param_scheduler = [dict(type='MultiStepLR', milestones=[LR_DECAY * accumulate], gamma=0.5, by_epoch=False)]
    # AdamW divides gradients by their size: with its default eps, gradients that are only rounding error would move
    # weights as much as the others
    cfg.optim_wrapper.optimizer.update(lr=1e-4, weight_decay=0.05, eps=1e-4)
    cfg.optim_wrapper.update(
        accumulative_counts=accumulate,
        clip_grad=dict(max_norm=5.0),
        constructor='swinv2_mm.LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.8),
    )
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=SAVED * accumulate, max_keep_ckpts=-1)
    cfg.default_hooks.logger = dict(type='LoggerHook', interval=1)
    cfg.custom_hooks.append(dict(type='RecordHook'))
    cfg.randomness = dict(seed=0)
    cfg.load_from = str(data / START)
    cfg.launcher = 'pytorch' if int(os.environ.get('WORLD_SIZE', 1)) > 1 else 'none'


def resumed(cfg: Config, checkpoint: Path) -> Config:
    """The config, resumed from a checkpoint."""
    cfg.update(resume=True, load_from=str(checkpoint))
    return cfg


def train(cfg: Config):
    """Train as tools/train.py does; returns the runner. With DeepSpeed, call `finish` on it."""
    if 'strategy' in cfg:
        skip_compilation()
    runner = launch.build_runner(cfg)
    runner.train()
    return runner


def skip_compilation() -> None:
    """Keep DeepSpeed from compiling an operator that only inference on a CPU needs."""
    deepspeed = importlib.import_module('deepspeed')
    deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False


def finish(runner) -> None:
    """Free the memory that DeepSpeed would keep until the process ends."""
    if hasattr(runner.model, 'destroy'):
        runner.model.destroy()


@HOOKS.register_module()
class RecordHook(Hook):
    """Saves losses, gradient norms and memory of all processes as records.pth.

    If NANO_KILL is set, it kills the last process before that iteration, at the first start of a training.
    """

    def before_train(self, runner) -> None:
        torch.set_num_threads(1)  # the same order of summation in all processes, and no waiting for shared cores
        self.losses, self.norms = [], []

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        first_start = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0'
        if os.environ.get('NANO_KILL') == str(runner.iter) and get_rank() == runner.world_size - 1 and first_start:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.losses.append(outputs['loss'].item())
        norms = runner.message_hub.log_scalars.get('train/grad_norm')
        if norms is not None:
            self.norms.append(float(norms.current()))

    def after_train(self, runner) -> None:
        records = all_gather_object(dict(losses=self.losses, norms=self.norms, **memory_use(runner)))
        if get_rank() == 0:
            torch.save(records, Path(runner.work_dir) / 'records.pth')


@HOOKS.register_module()
class StallInSecondEpoch(Hook):
    """Write a file `stalled_RANK` at the first step of the second epoch, and wait there to be killed."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.epoch == 1:
            Path(f'stalled_{os.environ["RANK"]}').touch()
            time.sleep(3600)


def memory_use(runner) -> dict[str, int]:
    """Bytes of parameters and of optimizer states in this process."""
    optimizer = runner.optim_wrapper.optimizer
    inner = [getattr(optimizer, name) for name in ('optim', 'optimizer') if hasattr(optimizer, name)]
    states = (inner or [optimizer])[0].state.values()  # ZeRO of torch and DeepSpeed wrap the local optimizer
    parameters = list(runner.model.parameters())
    shards = [p.ds_tensor for p in parameters if hasattr(p, 'ds_tensor')]  # of DeepSpeed's stage 3
    return dict(
        parameters=sum(nbytes(p) for p in parameters + shards),
        states=sum(nbytes(value) for state in states for value in state.values() if torch.is_tensor(value)),
    )


def nbytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, 'to_local') else tensor
    return local.numel() * local.element_size()


# ---------------------------------------------------------------- results of trainings


def records(folder: Path, key: str) -> torch.Tensor:
    """The values of a key of records.pth, for each process."""
    return torch.tensor([process[key] for process in torch.load(folder / 'records.pth', weights_only=True)])


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint, a file or a folder."""
    return read_checkpoint(path / 'weights.pth' if path.is_dir() else path)['state_dict']


def same_weights(one: Path, other: Path) -> bool:
    """Whether the weights of two checkpoints are bitwise equal."""
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def last(folder: Path) -> Path:
    """The checkpoint at the end of a training."""
    return max(folder.glob('iter_*.pth'), key=lambda path: int(path.stem.removeprefix('iter_')))


def check_agreement(
    folder: Path,
    reference: Path,
    start: Path,
    first: float = 0.0,
    rest: float = 0.0,
    norm: float = 0.0,
    distance: float = 0.0,
) -> None:
    """Assert that losses, gradient norms and final weights are those of one process, within tolerances.

    Args:
        folder: A training of several processes.
        reference: The training of one process on the joint batch.
        start: Initial checkpoint of both.
        first: Relative tolerance of the losses of the first three steps.
        rest: Relative tolerance of all losses.
        norm: Relative tolerance of the gradient norms of the first three steps.
        distance: Distance of the final weights, relative to their distance from the start.
    """
    losses = records(folder, 'losses')
    processes = len(losses)
    losses = losses.view(processes, STEPS, -1).permute(1, 2, 0).flatten(1)
    images = losses.shape[1]
    expected = records(reference, 'losses').view(STEPS, images)
    torch.testing.assert_close(losses[:3], expected[:3], rtol=first, atol=0)
    torch.testing.assert_close(losses, expected, rtol=rest, atol=0)
    norms, norms_expected = (
        records(folder, 'norms')[0, :: images // processes],
        records(reference, 'norms')[0, ::images],
    )
    assert (norms_expected > 5).any(), 'gradients were never clipped'
    torch.testing.assert_close(norms[:3], norms_expected[:3], rtol=norm, atol=0)
    initial, found, wanted = weights(start), weights(last(folder)), weights(last(reference))
    assert found.keys() == wanted.keys() == initial.keys()
    moved, apart = (
        sum((wanted[name] - other[name]).double().square().sum() for name in wanted) ** 0.5
        for other in (initial, found)
    )
    assert moved > 0
    assert apart <= distance * moved
