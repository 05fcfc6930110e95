"""Draw the training samples of a config after its pipeline, with their annotations.

python tools/analysis_tools/browse_dataset.py configs/det/htc_swinv2_t.py --not-show --output-dir samples

Runs the script of the config's toolbox with the same arguments. Other arguments are passed on to it: the scripts of
mmpretrain and mmaction also have --phase train|val|test, --mode original|transformed|concat|pipeline and --show-number,
that of mmaction the folder as second argument and --fps.
"""

import argparse
import functools
import importlib.util
import inspect
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from mmengine.config import Config, DictAction

import swinv2_mm  # noqa: F401  before any toolbox: it applies workarounds that the toolboxes' imports need
from swinv2_mm.cli import checks, classes, launch

SCRIPTS = {
    'mmdet': 'analysis_tools/browse_dataset.py',
    'mmseg': 'analysis_tools/browse_dataset.py',
    'mmpretrain': 'visualization/browse_dataset.py',
    'mmaction': 'visualizations/browse_dataset.py',
}


def toolbox_script(toolbox: str, script: str) -> Path:
    """Path of a script of a toolbox.

    Args:
        toolbox: Its package, such as 'mmdet'.
        script: Path of the script in the toolbox's `tools` folder.

    Raises:
        FileNotFoundError: The toolbox is not installed, or installed without its scripts.
    """
    spec = importlib.util.find_spec(toolbox)
    if spec is None:
        raise FileNotFoundError(f'{toolbox} is not installed, but its tools/{script} is needed')
    package = Path(spec.origin).parent
    places = [package / '.mim/tools' / script, package.parent / 'tools' / script]  # a wheel, a clone
    for path in places:
        if path.is_file():
            return path
    raise FileNotFoundError(f'{toolbox} is installed without tools/{script}: there is no {places[0]}')


def run_script(script: Path, cfg: Config, arguments: list[str]) -> None:
    """Run a toolbox's script in this process, with a config to which --cfg-options are already applied."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, 'config.py')
        cfg.dump(config)
        sys.argv = [str(script), str(config), *arguments]
        runpy.run_path(str(script), run_name='__main__')


def prepare(cfg: Config, toolbox: str) -> None:
    """Add the visualizer that the scripts expect, and unwrap RepeatDataset, whose iteration never ends."""
    loader = cfg.train_dataloader
    while str(loader.dataset.type).split('.')[-1] == 'RepeatDataset':
        loader.dataset = loader.dataset.dataset
    cfg.setdefault('visualizer', dict(type='SegLocalVisualizer' if toolbox == 'mmseg' else 'DetLocalVisualizer'))
    cfg.visualizer.setdefault('name', 'browse_dataset')  # usually set by the Runner


def patch_visualizer(toolbox: str) -> None:
    """Work around errors of the toolboxes' scripts and visualizers.

    mmdet's uses the classes of instances for the values of a semantic map, but COCO-Stuff has more values. mmseg's
    passes OpenCV an array that is not contiguous, on which OpenCV cannot draw. mmpretrain's script calls a function of
    matplotlib as older releases define it. mmaction's saves videos with moviepy 1; without it, the frames are saved as
    images.
    """
    if toolbox == 'mmdet':
        _name_stuff()
    elif toolbox == 'mmseg':
        from mmseg.visualization import SegLocalVisualizer

        change_arguments(SegLocalVisualizer, lambda kwargs: kwargs.update(image=np.ascontiguousarray(kwargs['image'])))
    elif toolbox == 'mmpretrain':
        _default_renderer()
    elif toolbox == 'mmaction' and not _has_moviepy_1():
        from mmaction.visualization import ActionVisualizer

        change_arguments(ActionVisualizer, lambda kwargs: kwargs.update(out_type='img'))
        print('moviepy<2 is not installed: the frames are saved as images.')


def _default_renderer() -> None:
    """Make the renderer optional that `adjust_bbox` requires since matplotlib 3.11."""
    from matplotlib import _tight_bbox

    adjust = _tight_bbox.adjust_bbox
    if 'renderer' in inspect.signature(adjust).parameters:

        @functools.wraps(adjust)
        def adjust_bbox(figure, box, renderer=None, *args):
            return adjust(figure, box, renderer or figure.canvas.get_renderer(), *args)

        _tight_bbox.adjust_bbox = adjust_bbox


def _name_stuff() -> None:
    """Give values of a semantic map that are not classes of instances a colour, and their number as name."""
    from mmdet.visualization import DetLocalVisualizer, get_palette

    draw = DetLocalVisualizer._draw_sem_seg

    @functools.wraps(draw)
    def draw_sem_seg(self, image, sem_seg, classes, palette):
        names = [*classes, *map(str, range(len(classes), 256))]
        return draw(self, image, sem_seg, names, [*palette, *get_palette('random', 256)[len(palette) :]])

    DetLocalVisualizer._draw_sem_seg = draw_sem_seg


def _has_moviepy_1() -> bool:
    try:
        return importlib.util.find_spec('moviepy.editor') is not None
    except ModuleNotFoundError:
        return False


def change_arguments(visualizer: type, change: Callable[[dict], None]) -> None:
    """Patch a visualizer so that `change` edits the keyword arguments of `add_datasample`."""
    draw = visualizer.add_datasample

    @functools.wraps(draw)
    def add_datasample(*args, **kwargs):
        change(kwargs)
        return draw(*args, **kwargs)

    visualizer.add_datasample = add_datasample


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; unknown arguments are passed on to the toolbox's script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('--output-dir', help='folder for the pictures')
    parser.add_argument('--not-show', action='store_true', help='open no window (mmaction never does)')
    parser.add_argument('--show-interval', type=float, default=2, help='seconds for each window (default: 2)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='change the config: key=value')
    return parser.parse_known_args(argv)


def script_arguments(args: argparse.Namespace, others: list[str], toolbox: str) -> list[str]:
    """Arguments for the toolbox's script.

    Raises:
        ValueError: It would open windows, but there is no display.
    """
    if toolbox == 'mmaction':
        return [args.output_dir, *others] if args.output_dir else others
    if not args.not_show and sys.platform == 'linux' and not (os.getenv('DISPLAY') or os.getenv('WAYLAND_DISPLAY')):
        raise ValueError('there is no display for windows: use --not-show --output-dir DIR')
    places = ['--output-dir', args.output_dir] if args.output_dir else []
    return [*places, *['--not-show'] * args.not_show, '--show-interval', str(args.show_interval), *others]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args, others = parse_args(argv)
    with launch.one_line_errors(FileNotFoundError, ImportError, ValueError):
        cfg = launch.load_config(args.config, args.cfg_options)
        toolbox = cfg.get('default_scope')
        if toolbox not in SCRIPTS:
            raise ValueError(f'default_scope of the config must be one of {", ".join(SCRIPTS)}, got {toolbox!r}')
        script = toolbox_script(toolbox, SCRIPTS[toolbox])
        arguments = script_arguments(args, others, toolbox)
        classes.check_classes(cfg)
        checks.check_data(cfg, ['train'])
    prepare(cfg, toolbox)
    patch_visualizer(toolbox)
    run_script(script, cfg, arguments)


if __name__ == '__main__':
    main()
