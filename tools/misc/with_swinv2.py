"""Print a config that inherits from any config of mmdet, mmseg or mmaction2 and has a Swin V2 backbone.

python tools/misc/with_swinv2.py mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py --arch base > mine.py
python tools/misc/with_swinv2.py configs/my_config.py --arch large --window 24 > mine.py

The channels that neck and heads read, the normalisation of images and the optimizer change with the backbone. Before it
is printed, the config trains a step on random data, with one block in each stage. If that fails, the part that does not
work with Swin V2 is named, and nothing is printed.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

with contextlib.redirect_stdout(sys.stderr):  # mmengine imports DeepSpeed, which prints there
    from mmengine.logging import MMLogger

    import swinv2_mm  # noqa: F401  before any toolbox: it applies workarounds that the toolboxes' imports need
    from swinv2_mm.checkpoints.loaders import SCHEME, find_release
    from swinv2_mm.cli import launch, with_swinv2
    from swinv2_mm.cli.checks import seen_from
    from swinv2_mm.models.sizes import ARCHS

# pre-trained weights of each size; those of H and G were never released
WEIGHTS = {
    'tiny': 'swinv2://tiny_window8_256',
    'small': 'swinv2://small_window8_256',
    'base': 'swinv2://base_window12_192_22k',
    'large': 'swinv2://large_window12_192_22k',
    'giant_simmim': 'swinv2://simmim_giant_22k_500k',
}
MAX_WINDOW = 128  # the position bias of larger ones takes GiB; those of the paper have up to 56 tokens


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'config',
        help='config of a toolbox, such as mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py, or a file; '
        'with `> FOLDER/mine.py`, the path of a file is printed relative to FOLDER (on Linux)',
    )
    parser.add_argument('--arch', choices=list(ARCHS), default='tiny', help='size of the backbone (default: tiny)')
    parser.add_argument(
        '--window', type=int, help='window size in tokens (default: 16; of clips, 7, with 8 frames in a window)'
    )
    parser.add_argument(
        '--weights',
        help="checkpoint: swinv2://NAME, a file or an address; '' for none (default: a release of this size)",
    )
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> str:
    """The text of the new config.

    Raises:
        FileNotFoundError: There is no such config.
        ModuleNotFoundError: Its toolbox is not installed.
        ValueError: The config cannot be read, or does not work with Swin V2; or an argument is out of range.
    """
    MMLogger.get_instance('with_swinv2', log_level='WARNING')  # or mmengine logs how each parameter is initialised
    if args.window is not None and not 1 <= args.window <= MAX_WINDOW:
        raise ValueError(f'--window must be between 1 and {MAX_WINDOW}, got {args.window}')
    weights = WEIGHTS.get(args.arch) if args.weights is None else args.weights
    check_weights(weights, args.arch)
    base = args.config
    if '::' not in base:
        launch.load_config(base)  # for its error messages
        base = os.path.abspath(base)
    try:
        cfg = with_swinv2.read(with_swinv2.source(base, {}))
    except (AssertionError, RuntimeError, ValueError) as error:  # not a name of a config, or a "lazy" config
        raise ValueError(f'config {args.config} cannot be inherited by a config with `_base_`: {error}') from error
    parts, notes = with_swinv2.changes(cfg, with_swinv2.Backbone(args.arch, args.window, weights))
    is_used = with_swinv2.check(with_swinv2.read(with_swinv2.source(base, parts)))
    if not is_used and not cfg.get('find_unused_parameters'):
        parts['find_unused_parameters'] = True  # or training on several GPUs fails
        notes.append('find_unused_parameters: neck and heads do not read all feature maps of the backbone')
    printed = base if '::' in base else os.path.relpath(base, output_folder())
    return with_swinv2.source(printed, parts, notes)


def check_weights(weights: str | None, arch: str) -> None:
    """Check that a checkpoint exists, and that a release has the size of the backbone.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no such release, or it has another size.
    """
    if not weights:
        return
    if weights.startswith(SCHEME):
        find_release(weights)
        sizes = set(weights.removeprefix(SCHEME).split('_')) & set(ARCHS)
        if arch.split('_')[0] not in sizes:
            raise ValueError(f'--weights {weights} are of a {sizes.pop()} model, but --arch is {arch}')
    elif '://' not in weights and not os.path.exists(weights):
        raise FileNotFoundError(f'--weights {weights} does not exist{seen_from(weights)}')


def output_folder() -> str:
    """The folder of the file that the standard output is redirected to (Linux), or the working folder."""
    path = os.path.realpath('/dev/stdout')
    return os.path.dirname(path) if os.path.isfile(path) else os.getcwd()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    errors = launch.one_line_errors(FileNotFoundError, ModuleNotFoundError, ValueError)
    with errors, contextlib.redirect_stdout(sys.stderr):  # the standard output is for the config alone
        text = convert(args)
    print(text, end='')


if __name__ == '__main__':
    main()
