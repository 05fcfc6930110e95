"""Print a config with all that it inherits."""

import argparse
from collections.abc import Sequence

from mmengine.config import DictAction

import swinv2_mm  # noqa: F401  lets `_base_ = 'swinv2_mm::...'` be found
from swinv2_mm.cli import launch


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--save-path', help='write the config to this .py, .json or .yml file as well')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='change the config: key=value')
    args = parser.parse_args(argv)
    with launch.one_line_errors(FileNotFoundError, ModuleNotFoundError, ValueError):
        if args.save_path and not args.save_path.endswith(('.py', '.json', '.yml')):
            raise ValueError(f'--save-path {args.save_path}: the file must end in .py, .json or .yml')
        cfg = launch.load_config(args.config, args.cfg_options)
    print(cfg.pretty_text)
    if args.save_path:
        cfg.dump(args.save_path)


if __name__ == '__main__':
    main()
