"""Train a detector, segmentor, classifier or video recognizer: a script for configs of all four toolboxes.

python tools/train.py configs/det/htc_swinv2_t.py --work-dir work_dirs/htc
"""

import argparse
import os
from collections.abc import Sequence

from mmengine.config import Config

import swinv2_mm  # noqa: F401  before any toolbox: it applies workarounds that the toolboxes' imports need
from swinv2_mm.checkpoints import CheckpointError
from swinv2_mm.cli import checks, classes, launch, unused


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line: the flags of the four toolboxes' own scripts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir', help='folder for logs and checkpoints (default: ./work_dirs/<name of the config>)'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint, or without a path from the last one in the work folder',
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision (needs a GPU)')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the total batch size'
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate during training')
    parser.add_argument('--seed', type=int, help='seed of all random numbers')
    parser.add_argument('--diff-rank-seed', action='store_true', help='a different seed for each process')
    parser.add_argument('--deterministic', action='store_true', help='use only deterministic GPU kernels')
    return launch.parse_args(parser, argv)


def configure(args: argparse.Namespace, cfg: Config) -> None:
    """Apply the flags to the config.

    Raises:
        ValueError: A flag does not fit the config or the machine.
    """
    cfg.launcher = args.launcher
    cfg.work_dir = launch.default_work_dir(cfg, args.config, args.work_dir)
    if args.resume == 'auto':
        # at the first of several starts there is no checkpoint yet; it keeps `load_from`
        cfg.resume = os.path.exists(os.path.join(cfg.work_dir, 'last_checkpoint'))
        cfg.load_from = None if cfg.resume else cfg.get('load_from')
    elif args.resume:
        cfg.resume, cfg.load_from = True, args.resume
    if args.amp:
        if launch.get_device() == 'cpu':
            raise ValueError('--amp needs a GPU, but this machine has none')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config')
        cfg.auto_scale_lr.enable = True
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    randomness = dict(cfg.get('randomness') or {})
    if args.seed is not None:
        randomness['seed'] = args.seed
    for flag in ('diff_rank_seed', 'deterministic'):
        if getattr(args, flag):
            randomness[flag] = True
    cfg.randomness = dict(dict(seed=None), **randomness)
    if cfg.randomness.get('deterministic'):
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # deterministic cuBLAS needs it


def check(args: argparse.Namespace, cfg: Config) -> None:
    """Check the config before the training starts.

    Raises:
        FileNotFoundError: Data or a checkpoint is missing.
        ImportError: A transform needs a package that is not installed.
        ValueError: Anything else.
    """
    launch.check_runner(cfg)
    backbone = classes.check_classes(cfg)
    if backbone is not None:
        unused.check_unused(cfg, backbone)
    checks.check_init_cfg(cfg)
    checks.check_data(cfg, ['train', 'val'])
    checks.check_metrics(cfg, ['val'])
    checks.check_num_classes(cfg, ['val'])
    checks.check_transforms(cfg, ['train', 'val'])
    if cfg.get('resume') and cfg.get('load_from') is None:
        checks.check_last_checkpoint(cfg.work_dir)
    checks.check_checkpoint(cfg.get('load_from'), '--resume' if cfg.get('resume') else 'load_from')
    checks.check_processes(args.preflight)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with launch.one_line_errors(FileNotFoundError, ModuleNotFoundError, ValueError):
        cfg = launch.load_config(args.config, args.cfg_options)
    with launch.one_line_errors(FileNotFoundError, ImportError, ValueError):
        configure(args, cfg)
        check(args, cfg)
    if args.preflight:
        return
    with launch.process_group(), launch.one_line_errors(CheckpointError):
        launch.build_runner(cfg).train()


if __name__ == '__main__':
    main()
