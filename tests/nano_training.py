"""A nano HTC trained on one or several processes, without anything random, so that all ways to do it must agree.

mmdet divides most losses by numbers of its own process. What one process does for the joint batch is therefore to take
the images of all processes one by one and to accumulate the gradients.

Run by torchrun, this file trains once for each saver of memory that it is given, and leaves what it saw in FOLDER:
    python -m torch.distributed.run --nproc_per_node 2 tests/nano_training.py FOLDER DATA ddp zero1 fsdp
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.dist import all_gather_object, get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, DefaultScope
from nano_det import SHAPES, shrink_model
from tool_runs import free_port

from swinv2_mm.engine import launch

CONFIGS = Path(__file__).parents[1] / 'configs'
IMAGES, SIZE, STEPS = 8, 96, 20
START = 'start.pth'


def write_data(folder: Path) -> Path:
    """The images that are trained on, and the weights to start from, which otherwise depend on who draws them when."""
    arguments = ['--train', str(IMAGES), '--val', '1', '--size', str(SIZE), '--seed', '0']
    subprocess.run([sys.executable, SHAPES, folder, *arguments], check=True, stdout=subprocess.DEVNULL)
    torch.manual_seed(0)
    model = MODELS.build(config(folder, folder).model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), folder / START)
    return folder


def config(folder: Path, data: Path, saver: str = 'ddp', accumulate: int = 1, steps: int = STEPS) -> Config:
    """The HTC of SwinV2-T at a nano size with what `configs/_base_/memory/{saver}.py` adds, or nothing for 'ddp'.

    Args:
        folder: Where checkpoints and logs go.
        data: What `write_data` has written.
        saver: Name of a config of `configs/_base_/memory`.
        accumulate: Iterations for one step of the optimizer.
        steps: Steps of the optimizer.
    """
    bases = [CONFIGS / 'det/htc_swinv2_t.py', *([CONFIGS / f'_base_/memory/{saver}.py'] if saver != 'ddp' else [])]
    folder.mkdir(parents=True, exist_ok=True)
    leaf = folder / f'leaf{os.environ.get("RANK", 0)}.py'
    leaf.write_text(f'_base_ = {[str(base) for base in bases]}\n')
    cfg = Config.fromfile(leaf)
    cfg.work_dir, cfg.experiment_name = str(folder), folder.name
    cfg.model = without_chance(shrink_model(cfg.model))
    dataset = cfg.train_dataloader.dataset
    dataset.update(data_root=str(data), pipeline=[dict(step, _scope_='mmdet') for step in pipeline()])
    dataset.metainfo = dict(classes=('disk', 'square', 'triangle'))
    cfg.train_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=False)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps * accumulate, val_interval=10**6)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.param_scheduler = []
    # AdamW divides gradients by their size: without a larger eps, those that are all rounding error would be as large
    # as the others after it
    cfg.optim_wrapper.optimizer.update(lr=1e-4, eps=1e-4)
    cfg.optim_wrapper.update(
        accumulative_counts=accumulate,
        clip_grad=dict(max_norm=5.0),
        constructor='swinv2_mm.LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.8),
    )
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=(steps + 1) // 2 * accumulate, max_keep_ckpts=-1)
    cfg.default_hooks.logger.interval = 1
    cfg.custom_hooks.append(dict(type='Notes'))
    cfg.randomness = dict(seed=0)
    cfg.load_from = str(data / START)
    return cfg


def pipeline() -> list[dict]:
    """Images and their annotations as they are."""
    return [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True, with_seg=True),
        dict(type='PackDetInputs'),
    ]


def without_chance(model: dict) -> dict:
    """The model's config without drop path, with as many samples as there are, and for small images."""
    model.backbone.update(drop_path_rate=0.0, window_size=4, with_cp=False)
    model.neck[0].drop_path_rate = 0.0
    for stage in (model.train_cfg.rpn, *model.train_cfg.rcnn):
        stage.sampler.num = 10**5
    model.train_cfg.rpn_proposal.max_per_img = 6
    for head in (*model.roi_head.mask_head, model.roi_head.semantic_head):
        head.num_convs = 1
    (pad,) = model.data_preprocessor.batch_augments
    pad.size = (SIZE, SIZE)
    return model


@HOOKS.register_module()
class Notes(Hook):
    """Writes down losses, norms of gradients, and the bytes that a process holds, of all processes.

    Kills the last process before iteration NANO_KILL, if that is set, at the first start of a training.
    """

    def before_train(self, runner) -> None:
        torch.set_num_threads(1)  # sums in the same order everywhere; nor do threads wait where cores are shared
        self.losses, self.norms = [], []

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        first_start = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0'
        if os.environ.get('NANO_KILL') == str(runner.iter) and get_rank() == runner.world_size - 1 and first_start:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.losses.append(float(outputs['loss']))
        norms = runner.message_hub.log_scalars.get('train/grad_norm')
        if norms is not None:
            self.norms.append(float(norms.current()))

    def after_train(self, runner) -> None:
        notes = all_gather_object(dict(losses=self.losses, norms=self.norms, **held(runner)))
        if get_rank() == 0:
            torch.save(notes, Path(runner.work_dir) / 'notes.pth')


def held(runner) -> dict[str, int]:
    """Bytes of parameters and of optimizer states that this process holds."""
    optimizer = runner.optim_wrapper.optimizer
    inner = [
        getattr(optimizer, name) for name in ('optim', 'optimizer') if hasattr(optimizer, name)
    ]  # torch, DeepSpeed
    states = (inner or [optimizer])[0].state.values()
    return dict(
        parameters=sum(nbytes(p) for p in runner.model.parameters()),
        states=sum(nbytes(value) for state in states for value in state.values() if torch.is_tensor(value)),
    )


def nbytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, 'to_local') else tensor
    return local.numel() * local.element_size()


def run(*args: str | Path, processes: int = 1, **env: str) -> subprocess.CompletedProcess:
    """Run this file; returns what it has printed, and how it ended."""
    if processes == 1:
        return run_python(__file__, *args, **env)
    return torchrun('--master_port', free_port(), __file__, *args, processes=processes, **env)


def torchrun(*args: str | int | Path, processes: int, **env: str) -> subprocess.CompletedProcess:
    """The same for any script, after arguments of torchrun."""
    return run_python('-m', 'torch.distributed.run', '--nproc_per_node', processes, *args, **env)


def run_python(*args: str | int | Path, **env: str) -> subprocess.CompletedProcess:
    """The same for Python itself."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def train(*args: str | Path, processes: int = 1) -> None:
    """The same, for what must succeed."""
    result = run(*args, processes=processes)
    assert result.returncode == 0, result.stdout[-3000:]


def notes(folder: Path, key: str) -> torch.Tensor:
    """What `Notes` has written down, for each process."""
    return torch.tensor([process[key] for process in torch.load(folder / 'notes.pth', weights_only=True)])


def main() -> None:
    """Train once for each saver, on the processes that torchrun has started, or on this one."""
    parser = argparse.ArgumentParser()
    parser.add_argument('folder', type=Path)
    parser.add_argument('data', type=Path)
    parser.add_argument('savers', nargs='+')
    parser.add_argument('--accumulate', type=int, default=1)
    parser.add_argument('--steps', type=int, default=STEPS)
    parser.add_argument('--resume', action='store_true')
    parser.add_argument('--ema', action='store_true')
    args = parser.parse_args()
    for saver in args.savers:
        cfg = config(args.folder / saver, args.data, saver, args.accumulate, args.steps)
        cfg.launcher = 'pytorch' if 'RANK' in os.environ else 'none'
        if args.resume:
            cfg.update(resume=True, load_from=None)
        if args.ema:
            cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.5))
        DefaultScope.overwrite_default_scope('mmdet')
        runner = launch.build_runner(cfg)
        runner.train()
        if hasattr(runner.model, 'destroy'):  # what DeepSpeed holds until the process ends
            runner.model.destroy()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # now and then a thread of gloo is still there when Python ends, which aborts the process


if __name__ == '__main__':
    main()
