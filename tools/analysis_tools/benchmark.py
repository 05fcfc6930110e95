"""Time and memory of a model in inference or training, on the GPU of this machine, or on the CPU if it has none.

python tools/analysis_tools/benchmark.py configs/det/htc_swinv2_t.py --task inference --shape 800 1280
python tools/analysis_tools/benchmark.py configs/det/htc_swinv2_t.py --checkpoint CKPT --task inference
python tools/analysis_tools/benchmark.py configs/video/swinv2_t_k400_224x224x32.py --task train --shape 32 224 224

Inference runs on a random input of shape --shape, or on the images of the test set one by one. Training runs on batches
of the training set, or for mmpretrain and video on a random input of shape --shape. A clip is one view of a video. Data
loading is not timed. The tasks `dataloader` and `dataset` do that: they run mmdet's script with the same arguments.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config, DictAction
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner, load_checkpoint
from torch import Tensor, nn

import swinv2_mm  # noqa: F401  before any toolbox: it applies workarounds that the toolboxes' imports need
from swinv2_mm.cli import checks, classes, launch
from swinv2_mm.cli.inputs import input_shape, random_data, toolbox

from browse_dataset import run_script, toolbox_script  # isort: skip
from get_flops import build_model  # isort: skip

MIB = 2**20
MMDET_SCRIPT, MMDET_TASKS = 'analysis_tools/benchmark.py', ('dataloader', 'dataset')


@dataclass
class Figures:
    """Result of one run: seconds per iteration, images or clips per iteration, and peak memory in bytes."""

    seconds: list[float]
    images: list[int]
    memory: int

    def rates(self) -> tuple[float, float, float]:
        """Median and fastest milliseconds per image or clip, and images or clips per second at the median."""
        each = [1000 * s / n for s, n in zip(self.seconds, self.images, strict=True)]
        median = statistics.median(each)
        return median, min(each), 1000 / median


# ---------------------------------------------------------------- what is timed


def batches(cfg: Config, task: str, shape: tuple[int, ...] | None) -> Iterator[dict]:
    """Infinite iterator of batches: one random input repeated, or the data set repeated."""
    if shape is not None:
        return itertools.repeat(random_data(cfg, shape))
    loader = cfg['test_dataloader' if task == 'inference' else 'train_dataloader']
    if task == 'inference':  # as in mmdet's script; data workers would compete with the model for the CPU
        loader.update(batch_size=1, num_workers=0, persistent_workers=False)
    return _again_and_again(Runner.build_dataloader(loader, seed=0))


def _again_and_again(loader) -> Iterator[dict]:
    while True:
        yield from loader


def make_step(cfg: Config, model: nn.Module, task: str) -> Callable[[dict], object]:
    """Return the timed function of a batch: one prediction, or one training step."""
    if task == 'inference':
        return torch.no_grad()(model.test_step)
    launch.adapt_to_cpu(cfg)
    optimizer = build_optim_wrapper(model.train(), cfg.optim_wrapper)
    return lambda data: model.train_step(data, optim_wrapper=optimizer)


def count(inputs: list[Tensor]) -> int:
    """Number of images or clips in a batch; a video (N, C, T, H, W) has N clips, one per view."""
    return sum(len(x) if x.dim() == 5 else 1 for x in inputs)


def measure(step: Callable, data: Iterator[dict], iterations: int, warmup: int, log_interval: int) -> Figures:
    """Run `warmup` iterations, then time each of `iterations`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    figures = Figures([], [], 0)
    for number, batch in enumerate(itertools.islice(data, warmup + iterations), start=1 - warmup):
        _wait_for_gpu()
        start = time.perf_counter()
        step(batch)
        _wait_for_gpu()
        if number < 1:
            continue
        figures.seconds.append(time.perf_counter() - start)
        figures.images.append(count(batch['inputs']))
        if number % log_interval == 0:
            print(f'Done batch [{number}/{iterations}], fps: {figures.rates()[2]:.2f}', flush=True)
    figures.memory = peak_memory()
    return figures


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Peak memory in bytes: allocated by torch on the GPU, or without a GPU the resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------- output


def report(runs: list[Figures], unit: str) -> str:
    """Table of the runs; `unit` is 'img' or 'clip'."""
    kind = 'max_memory_allocated of the GPU' if torch.cuda.is_available() else 'peak RSS of the process, no GPU'
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
    lines = [f'{"run":>5}{"iterations":>12}{f"median ms/{unit}":>16}{"fastest":>10}{f"{unit}/s":>10}{"memory MiB":>12}']
    for number, run in enumerate(runs, start=1):
        median, fastest, rate = run.rates()
        lines.append(
            f'{number:>5}{len(run.seconds):>12}{median:>16.2f}{fastest:>10.2f}{rate:>10.2f}{run.memory / MIB:>12.0f}'
        )
    return '\n'.join([*lines, f'Device: {device}. Memory: {kind}.'])


# ---------------------------------------------------------------- command line


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; unknown arguments are passed on to mmdet's script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('--checkpoint', help='weights to load (default: random ones)')
    parser.add_argument('--task', choices=['inference', 'train', *MMDET_TASKS], default='inference')
    parser.add_argument(
        '--shape', type=int, nargs='+', metavar='N', help='shape of random inputs, see get_flops.py (default: test set)'
    )
    parser.add_argument('--repeat-num', type=int, default=1, help='number of runs (default: 1)')
    parser.add_argument('--max-iter', type=int, default=100, help='timed iterations of a run (default: 100)')
    parser.add_argument('--num-warmup', type=int, default=5, help='iterations before them (default: 5)')
    parser.add_argument('--log-interval', type=int, default=50, help='iterations between lines (default: 50)')
    parser.add_argument(
        '--dataset-type', choices=['train', 'val', 'test'], default='test', help='data of dataloader and dataset'
    )
    parser.add_argument('--fuse-conv-bn', action='store_true', help='fuse convolutions with batch norms')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='change the config: key=value')
    args, others = parser.parse_known_args(argv)
    if others and args.task not in MMDET_TASKS:
        parser.error(f'unrecognized arguments: {" ".join(others)}')
    return args, others


def check(args: argparse.Namespace, cfg: Config) -> tuple[int, ...] | None:
    """Check the arguments and the config; returns the shape of random inputs, or None for data of the config.

    Raises:
        FileNotFoundError: Data or the checkpoint is missing.
        ValueError: An argument is out of range or does not fit the task.
    """
    for option, least in (('repeat_num', 1), ('max_iter', 1), ('num_warmup', 0), ('log_interval', 1)):
        if getattr(args, option) < least:
            raise ValueError(f'--{option.replace("_", "-")} must be at least {least}, got {getattr(args, option)}')
    toolbox(cfg)
    classes.check_classes(cfg)
    checks.check_checkpoint(args.checkpoint, '--checkpoint')
    makes_labels = args.task == 'train' and cfg.default_scope in ('mmaction', 'mmpretrain')
    if args.task == 'inference' and cfg.model.get('type') == 'SimMIM':
        raise ValueError('a model for pre-training predicts nothing: measure it with --task train')
    if args.shape and args.task != 'inference' and not makes_labels:
        raise ValueError(f'--shape makes inputs without labels, and --task {args.task} takes the data of the config')
    if args.shape:
        return input_shape(cfg, args.shape)
    split = {'inference': 'test', 'train': 'train'}.get(args.task, args.dataset_type)
    checks.check_data(cfg, [split])
    return None


def mmdet_arguments(args: argparse.Namespace) -> list[str]:
    """Arguments for mmdet's script."""
    names = ('task', 'dataset_type', 'repeat_num', 'max_iter', 'num_warmup', 'log_interval')
    return [word for name in names for word in (f'--{name.replace("_", "-")}', str(getattr(args, name)))]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args, others = parse_args(argv)
    with launch.one_line_errors(FileNotFoundError, ImportError, ValueError):
        cfg = launch.load_config(args.config, args.cfg_options)
        shape = check(args, cfg)
        script = toolbox_script('mmdet', MMDET_SCRIPT) if args.task in MMDET_TASKS else None
    if script:
        run_script(script, cfg, mmdet_arguments(args) + others)
        return
    torch.manual_seed(0)
    model = build_model(cfg)
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint, map_location='cpu')
    if args.fuse_conv_bn:
        model = fuse_conv_bn(model)
    step, data = make_step(cfg, model, args.task), batches(cfg, args.task, shape)
    settings = (args.max_iter, args.num_warmup, args.log_interval)
    unit = 'clip' if cfg.default_scope == 'mmaction' else 'img'
    print(report([measure(step, data, *settings) for _ in range(args.repeat_num)], unit))
    if not args.checkpoint and cfg.default_scope == 'mmdet':
        print('The weights are random: with a trained model, the number of detections and so the time can differ.')


if __name__ == '__main__':
    main()
