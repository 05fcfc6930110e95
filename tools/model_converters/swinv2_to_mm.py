"""Convert any public Swin V2 checkpoint to the names of this package, with the windows that it was pre-trained with.

Not needed for training: every checkpoint loads as it is. Use it to inspect a file, to drop the optimizer state, to add
the pre-training windows to a file without them, or to extract the weights from a file that is refused because it
contains more than data.
"""

import argparse
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from swinv2_mm.checkpoints import CheckpointError, load_swinv2_state_dict
from swinv2_mm.checkpoints.conversion import write_windows
from swinv2_mm.checkpoints.layouts import describe_arch
from swinv2_mm.cli.launch import one_line_errors


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', help='file, http(s) address, or swinv2://NAME of a release')
    parser.add_argument('dst', type=Path, help='file to write, .pth or .safetensors')
    parser.add_argument(
        '--pretrained-window-sizes',
        type=int,
        nargs='+',
        metavar='W',
        help='window of pre-training of each stage, for a file without it, such as 12 12 12 6',
    )
    parser.add_argument('--trust', action='store_true', help='let the file execute code while it is read')
    return parser.parse_args(argv)


def check_target(dst: Path) -> None:
    """Check that the result can be written.

    Raises:
        FileNotFoundError: Its folder does not exist.
        ValueError: Its suffix is of no supported format.
    """
    if dst.suffix not in ('.pth', '.safetensors'):
        raise ValueError(f'{dst} must end with .pth or .safetensors')
    if not dst.parent.is_dir():
        raise FileNotFoundError(f'folder {dst.parent} does not exist')


def save(weights: dict[str, torch.Tensor], dst: Path) -> None:
    """Write weights in the format that the suffix names."""
    if dst.suffix == '.safetensors':
        save_file({name: value.contiguous() for name, value in weights.items()}, dst, metadata={'format': 'pt'})
    else:
        # clones: what is a part of a larger tensor in the source would be saved with the whole of it
        torch.save({'state_dict': OrderedDict((n, v.clone()) for n, v in weights.items()), 'meta': {}}, dst)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with one_line_errors(CheckpointError, FileNotFoundError, ValueError):
        check_target(args.dst)
        weights = load_swinv2_state_dict(args.src, trust=args.trust)
        if args.pretrained_window_sizes:
            weights = write_windows(weights, args.pretrained_window_sizes)
        save(weights, args.dst)
    windows = {
        re.match(r'layers\.\d+', n)[0]: tuple(v.tolist()) for n, v in weights.items() if n.endswith('_window_size')
    }
    print(f'{args.dst}: {len(weights)} entries, {describe_arch({n: v.shape for n, v in weights.items()})}')
    print(f'pre-training windows: {", ".join(map(str, windows.values())) or "unknown: pass --pretrained-window-sizes"}')


if __name__ == '__main__':
    main()
