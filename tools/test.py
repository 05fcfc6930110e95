"""Test a detector, segmentor, classifier or video recognizer: a script for configs of all four toolboxes.

python tools/test.py configs/det/htc_swinv2_t.py work_dirs/htc/epoch_36.pth
"""

import argparse
import copy
from collections.abc import Sequence

import mmengine
from mmengine.config import Config, ConfigDict

import swinv2_mm  # noqa: F401  before any toolbox: it applies workarounds that the toolboxes' imports need
from swinv2_mm.checkpoints import CheckpointError
from swinv2_mm.cli import checks, classes, launch
from swinv2_mm.cli.errors import rank
from swinv2_mm.cli.weights import TestedWeightsHook

VIDEO_HOOK = 'swinv2_mm.engine.video_visualization.VideoVisualizationHook'
# options of sharded training; a test needs all weights in each process
TRAINING_ONLY = ('runner_type', 'strategy', 'model_wrapper_cfg')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line: the flags of the four toolboxes' own scripts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--work-dir', help='folder for logs and metrics (default: ./work_dirs/<name of the config>)')
    parser.add_argument('--out', help='save predictions: a .pkl file, or a folder of label maps (mmseg)')
    parser.add_argument('--out-item', choices=['pred', 'metrics'], help='what --out saves (default: pred)')
    parser.add_argument('--dump', help='save predictions in a .pkl file')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='save drawn predictions, for mmdet inside the work folder')
    parser.add_argument('--interval', type=int, default=1, help='draw every Nth image or video (not for mmdet)')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds for each picture of --show')
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: tta_model and tta_pipeline of the config; the default for detectors and '
        'classifiers is flips',
    )
    return launch.parse_args(parser, argv)


def configure(args: argparse.Namespace, cfg: Config) -> None:
    """Apply the flags to the config.

    Raises:
        ValueError: A flag does not fit the config.
    """
    cfg.launcher = args.launcher
    cfg.work_dir = launch.default_work_dir(cfg, args.config, args.work_dir)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    for key in TRAINING_ONLY:
        cfg.pop(key, None)
    if args.tta:
        use_tta(cfg)
    if args.show or args.show_dir:
        show_predictions(cfg, args)
    if args.out_item and not args.out:
        raise ValueError('--out-item says what --out saves: add --out FILE')
    if args.out_item == 'metrics':
        check_suffix('--out', args.out, ('.json', '.pkl', '.yml'))
    elif args.out and cfg.get('default_scope') == 'mmseg':
        for metric in evaluators(cfg):
            metric.output_dir = args.out
    elif args.out:
        dump_predictions(cfg, args.out, '--out')
    if args.dump:
        dump_predictions(cfg, args.dump, '--dump')


def evaluators(cfg: Config) -> list:
    """The metrics of the test, as a list in the config."""
    if not isinstance(cfg.test_evaluator, list):
        cfg.test_evaluator = list(cfg.test_evaluator) if isinstance(cfg.test_evaluator, tuple) else [cfg.test_evaluator]
    return cfg.test_evaluator


def dump_predictions(cfg: Config, path: str, flag: str) -> None:
    """Save the predictions of all images, in the format of the toolbox's own scripts.

    Raises:
        ValueError: The path does not end in .pkl or .pickle.
    """
    check_suffix(flag, path, ('.pkl', '.pickle'))
    dump = 'DumpDetResults' if cfg.get('default_scope') == 'mmdet' else 'DumpResults'
    evaluators(cfg).append(dict(type=dump, out_file_path=path))


def check_suffix(flag: str, path: str, suffixes: tuple[str, ...]) -> None:
    """Check the type of a file to be written.

    Raises:
        ValueError: The path ends in none of the suffixes.
    """
    if not path.endswith(suffixes):
        raise ValueError(f'{flag} {path}: the file must end in {" or ".join(suffixes)}')


def show_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Draw predictions; the options of VisualizationHook differ between the toolboxes.

    Raises:
        ValueError: The config has no such hook, or the hook cannot draw augmented views.
    """
    scope = cfg.get('default_scope')
    hook = cfg.get('default_hooks', {}).get('visualization')
    of_samples = scope in ('mmaction', 'mmpretrain')  # their hooks have other options
    if hook is None:
        raise ValueError('--show and --show-dir need default_hooks.visualization in the config')
    if scope == 'mmpretrain' and args.tta:
        raise ValueError('--show and --show-dir draw one view of each image, but --tta has several: leave one out')
    if scope == 'mmaction' and hook.type == 'VisualizationHook':
        hook.type = VIDEO_HOOK  # mmaction's own fails on any video
    hook.show = args.show
    hook.wait_time = args.wait_time
    hook['enable' if of_samples else 'draw'] = True
    if scope != 'mmdet':
        hook.interval = args.interval  # the defaults of the hooks are 50 and 5000
    if scope == 'mmseg' and args.show_dir:
        cfg.visualizer.save_dir = args.show_dir
    elif args.show_dir:
        hook['out_dir' if of_samples else 'test_out_dir'] = args.show_dir


def use_tta(cfg: Config) -> None:
    """Test on augmented views and merge their predictions.

    Raises:
        ValueError: The config has no test-time augmentation, and there is no default for its kind of model.
    """
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if cfg.get('default_scope') == 'mmdet':
        rcnn = (cfg.model.get('test_cfg') or {}).get('rcnn') or {}  # NMS of a two-stage detector
        with_masks = 'swinv2_mm.models.det_tta.InstanceSegTTAModel'
        cfg.tta_model = cfg.get('tta_model') or dict(
            type=with_masks if checks.has_masks(cfg.model) else 'DetTTAModel',
            tta_cfg=dict(
                nms=rcnn.get('nms', dict(type='nms', iou_threshold=0.5)), max_per_img=rcnn.get('max_per_img', 100)
            ),
        )
        cfg.tta_pipeline = cfg.get('tta_pipeline') or flipped_pipeline(dataset.pipeline)
        if cfg.tta_model.type.split('.')[-1] == 'DetTTAModel' and checks.has_masks(cfg.model):
            raise ValueError(
                '--tta: DetTTAModel of mmdet merges only boxes, but this model also predicts masks; set '
                f'tta_model.type={with_masks}'
            )
    if cfg.get('default_scope') == 'mmpretrain':
        cfg.tta_model = cfg.get('tta_model') or dict(type='AverageClsScoreTTA')
        cfg.tta_pipeline = cfg.get('tta_pipeline') or flipped_pipeline(dataset.pipeline)
    missing = [name for name in ('tta_model', 'tta_pipeline') if name not in cfg]
    if missing:
        raise ValueError(f'--tta: the config has no {" and no ".join(missing)}')
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def flipped_pipeline(pipeline: list) -> list:
    """The test pipeline of a detector or classifier with two views of each image, original and flipped."""
    pack = copy.deepcopy(pipeline[-1])
    if 'meta_keys' in pack:  # by default, the flips are among them
        pack['meta_keys'] = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
    views = [[dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)], [pack]]
    return [*copy.deepcopy(pipeline[:-1]), dict(type='TestTimeAug', transforms=views)]


def check(args: argparse.Namespace, cfg: Config) -> None:
    """Check the config before the test starts.

    Raises:
        FileNotFoundError: Data or the checkpoint is missing.
        ImportError: A transform needs a package that is not installed.
        ValueError: Anything else.
    """
    checks.check_checkpoint(args.checkpoint, 'CHECKPOINT')
    if cfg.get('test_dataloader') is None:
        raise ValueError('the config has no test_dataloader: it is for training only')
    classes.check_classes(cfg)
    checks.check_data(cfg, ['test'])
    checks.check_metrics(cfg, ['test'])
    checks.check_num_classes(cfg, ['test'])
    checks.check_transforms(cfg, ['test'])
    checks.check_processes(args.preflight)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with launch.one_line_errors(FileNotFoundError, ModuleNotFoundError, ValueError):
        cfg = launch.load_config(args.config, args.cfg_options)
    with launch.one_line_errors(FileNotFoundError, ImportError, ValueError):
        check(args, cfg)
        configure(args, cfg)
    if args.preflight:
        return
    with launch.process_group(), launch.one_line_errors(CheckpointError):
        runner = launch.build_runner(cfg)
        runner.register_hook(TestedWeightsHook())
        metrics = runner.test()
        if args.out_item == 'metrics' and rank() == 0:
            mmengine.dump(metrics, args.out)


if __name__ == '__main__':
    main()
