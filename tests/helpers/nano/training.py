"""Trainings of a nano model on one or several processes without randomness: all of them must agree.

The model is smooth. If sums are taken in another order, a training differs by rounding only; a detector would select
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
STEPS, SAVED, FALL = 6, 4, 5  # of the optimizer; until the first checkpoint; until the learning rate falls
ARCH = dict(embed_dims=16, depths=(1, 1), num_heads=(1, 2))


@MODELS.register_module()
class Small(BaseModel):
    """A backbone of two blocks and a head, which predicts as many numbers as an image has."""

    def __init__(self, backbone: dict):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = nn.Conv2d(32, 32, 1)
        self.other_head = nn.Linear(32, 3)
        self.nothing = nn.Identity()
        self.threshold = 0.0

    def forward(self, inputs, mode='tensor', target=None):
        """Which modules run depends on the image, and in prediction on the threshold too, as in detectors."""
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
    """Write the initial weights, so that all trainings start from the same ones."""
    torch.manual_seed(0)
    model = MODELS.build(config(folder, folder).model)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, std=0.3)  # those of new blocks are 0, which stops gradients
    torch.save(dict(state_dict=model.state_dict()), folder / START)
    return folder


def config(folder: Path, data: Path, saver: str = 'ddp', accumulate: int = 1, steps: int = STEPS) -> Config:
    """The training of the small model with what `configs/_base_/memory/{saver}.py` adds, or nothing for 'ddp'.

    Args:
        folder: Where checkpoints and logs go.
        data: What `write_start` has written.
        saver: Name of a config of `configs/_base_/memory`.
        accumulate: Iterations for one step of the optimizer.
        steps: Steps of the optimizer.
    """
    backbone = dict(type='swinv2_mm.SwinTransformerV2', arch=ARCH, window_size=4)
    cfg = Config(
        dict(
            model=dict(
                type='Small',
                backbone=dict(backbone, pretrained_window_sizes=4, out_indices=(1,), drop_path_rate=0.0),
            ),
            train_dataloader=dict(dataset=dict(type='Pixels')),
            optim_wrapper=dict(type='AmpOptimWrapper', dtype='bfloat16', optimizer=dict(type='AdamW')),
            default_hooks=dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook')),
            custom_hooks=[dict(type='swinv2_mm.ReproducibleResumeHook')],
            log_level='WARNING',
        )
    )
    prepare(cfg, folder, data, saver, accumulate, steps)
    cfg.optim_wrapper.optimizer.lr = 1e-3
    if 'zero3' in saver:  # where it leaves small parameters whole in all processes, which all of these are
        cfg.strategy.zero_optimization.stage3_param_persistence_threshold = 100
    return cfg


def prepare(cfg: Config, folder: Path, data: Path, saver: str, accumulate: int, steps: int) -> None:
    """Set what trainings of all models share: AdamW, gradient clipping, layer-wise learning rates, a schedule."""
    if saver != 'ddp':
        cfg.merge_from_dict(Config.fromfile(MEMORY / f'{saver}.py').to_dict())
    cfg.work_dir, cfg.experiment_name = str(folder), folder.name
    cfg.train_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=False)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps * accumulate, val_interval=10**6)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.param_scheduler = [dict(type='MultiStepLR', milestones=[FALL * accumulate], gamma=0.5, by_epoch=False)]
    # AdamW divides gradients by their size: without a larger eps, those that are all rounding error would be as large
    # as the others after it
    cfg.optim_wrapper.optimizer.update(lr=1e-4, weight_decay=0.05, eps=1e-4)
    cfg.optim_wrapper.update(
        accumulative_counts=accumulate,
        clip_grad=dict(max_norm=5.0),
        constructor='swinv2_mm.LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.8),
    )
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=SAVED * accumulate, max_keep_ckpts=-1)
    cfg.default_hooks.logger = dict(type='LoggerHook', interval=1)
    cfg.custom_hooks.append(dict(type='Notes'))
    cfg.randomness = dict(seed=0)
    cfg.load_from = str(data / START)
    cfg.launcher = 'pytorch' if int(os.environ.get('WORLD_SIZE', 1)) > 1 else 'none'


def resumed(cfg: Config, checkpoint: Path) -> Config:
    """The config, resumed from a checkpoint."""
    cfg.update(resume=True, load_from=str(checkpoint))
    return cfg


def train(cfg: Config):
    """Train as tools/train.py does; returns the runner, to be given to `finish` if it is DeepSpeed's."""
    if 'strategy' in cfg:
        skip_compilation()
    runner = launch.build_runner(cfg)
    runner.train()
    return runner


def skip_compilation() -> None:
    """Do not let DeepSpeed compile what only inference on a CPU needs. Tools in processes of their own compile it."""
    deepspeed = importlib.import_module('deepspeed')
    deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False


def finish(runner) -> None:
    """Free the memory that DeepSpeed would keep until the process ends."""
    if hasattr(runner.model, 'destroy'):
        runner.model.destroy()


@HOOKS.register_module()
class Notes(Hook):
    """Saves losses, gradient norms and memory of all processes as notes.pth.

    Kills the last process before iteration SMALL_KILL, if that is set, at the first start of a training.
    """

    def before_train(self, runner) -> None:
        torch.set_num_threads(1)  # sums in the same order everywhere; nor do threads wait where cores are shared
        self.losses, self.norms = [], []

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        first_start = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0'
        if os.environ.get('SMALL_KILL') == str(runner.iter) and get_rank() == runner.world_size - 1 and first_start:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.losses.append(outputs['loss'].item())
        norms = runner.message_hub.log_scalars.get('train/grad_norm')
        if norms is not None:
            self.norms.append(float(norms.current()))

    def after_train(self, runner) -> None:
        notes = all_gather_object(dict(losses=self.losses, norms=self.norms, **held(runner)))
        if get_rank() == 0:
            torch.save(notes, Path(runner.work_dir) / 'notes.pth')


@HOOKS.register_module()
class StallInSecondEpoch(Hook):
    """Write a file `stalled_RANK` at the first step of the second epoch, and wait there to be killed."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.epoch == 1:
            Path(f'stalled_{os.environ["RANK"]}').touch()
            time.sleep(3600)


def held(runner) -> dict[str, int]:
    """Bytes of parameters and of optimizer states in this process."""
    optimizer = runner.optim_wrapper.optimizer
    inner = [getattr(optimizer, name) for name in ('optim', 'optimizer') if hasattr(optimizer, name)]
    states = (inner or [optimizer])[0].state.values()  # in those of torch and DeepSpeed, the optimizer of a process
    whole = list(runner.model.parameters())
    parts = [p.ds_tensor for p in whole if hasattr(p, 'ds_tensor')]  # at DeepSpeed's stage 3
    return dict(
        parameters=sum(nbytes(p) for p in whole + parts),
        states=sum(nbytes(value) for state in states for value in state.values() if torch.is_tensor(value)),
    )


def nbytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, 'to_local') else tensor
    return local.numel() * local.element_size()


# ---------------------------------------------------------------- what trainings have left


def notes(folder: Path, key: str) -> torch.Tensor:
    """The values of a key of notes.pth, for each process."""
    return torch.tensor([process[key] for process in torch.load(folder / 'notes.pth', weights_only=True)])


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint, which is a file or a folder."""
    return read_checkpoint(path / 'weights.pth' if path.is_dir() else path)['state_dict']


def same_weights(one: Path, other: Path) -> bool:
    """Whether the weights of two checkpoints are equal to the last bit."""
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
    way: float = 0.0,
) -> None:
    """Losses of each image, norms of gradients and final weights are those of one process, within tolerances.

    Args:
        folder: A training of several processes.
        reference: That of one process on the joint batch.
        start: Checkpoint from which both started.
        first: Relative tolerance of the losses of the first three steps.
        rest: That of all losses.
        norm: That of the norms of the first three steps.
        way: Distance of the final weights, relative to their distance from the start.
    """
    losses = notes(folder, 'losses')
    processes = len(losses)
    losses = losses.view(processes, STEPS, -1).permute(1, 2, 0).flatten(1)
    images = losses.shape[1]
    expected = notes(reference, 'losses').view(STEPS, images)
    torch.testing.assert_close(losses[:3], expected[:3], rtol=first, atol=0)
    torch.testing.assert_close(losses, expected, rtol=rest, atol=0)
    norms, norms_expected = notes(folder, 'norms')[0, :: images // processes], notes(reference, 'norms')[0, ::images]
    assert (norms_expected > 5).any(), 'gradients were never clipped'
    torch.testing.assert_close(norms[:3], norms_expected[:3], rtol=norm, atol=0)
    initial, found, wanted = weights(start), weights(last(folder)), weights(last(reference))
    assert found.keys() == wanted.keys() == initial.keys()
    moved, apart = (
        sum((wanted[name] - other[name]).double().square().sum() for name in wanted) ** 0.5
        for other in (initial, found)
    )
    assert moved > 0
    assert apart <= way * moved
