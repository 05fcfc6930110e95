"""Plot the amplitude of the activations after each block, as in Figure 2 of the paper.

python tools/analysis_tools/plot_activation_amplitude.py configs/seg/upernet_swinv2_b.py work_dirs/b/iter_160000.pth
python tools/analysis_tools/plot_activation_amplitude.py CONFIG CHECKPOINT --compare CONFIG CHECKPOINT --compare CONFIG

The amplitude is the variance of a channel of the main branch over all tokens of some batches of the test set, averaged
over the channels. Without CHECKPOINT the weights are those that a training starts from: see `init_cfg` of the config.
"""

import argparse
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.runner import Runner, load_checkpoint
from torch import Tensor, nn

import swinv2_mm  # noqa: F401  before any toolbox: it applies workarounds that the toolboxes' imports need
from swinv2_mm.cli import checks, classes, launch
from swinv2_mm.cli.errors import check_outputs
from swinv2_mm.cli.inputs import toolbox
from swinv2_mm.ops.files import write_whole

from get_flops import build_model  # isort: skip
from plot_position_bias import check_picture  # isort: skip


class ChannelVariance:
    """Variance of each channel over the tokens of several batches."""

    def __init__(self) -> None:
        self._tokens = self._sum = self._squares = 0

    def add(self, x: Tensor) -> None:
        """Add the activations of a batch, (B, *S, C)."""
        x = x.detach().flatten(0, -2).double()
        self._tokens += len(x)
        self._sum += x.sum(0)
        self._squares += x.square().sum(0)

    def mean(self) -> float:
        """Mean of the variances of all channels."""
        return (self._squares / self._tokens - (self._sum / self._tokens).square()).mean().item()


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Names and blocks of a model's backbone by depth.

    Raises:
        ValueError: The backbone has no attribute `blocks`, as those of this package do.
    """
    names = {module: name for name, module in model.backbone.named_modules()}
    blocks = getattr(model.backbone, 'blocks', None)
    if blocks is None:
        raise ValueError(
            f'model.backbone: {type(model.backbone).__name__} has no attribute `blocks`; the backbones of swinv2_mm do'
        )
    return {names[block]: block for block in blocks}


def record_amplitudes(model: nn.Module, blocks: dict[str, nn.Module], batches: Iterable[dict]) -> dict[str, float]:
    """Amplitude of the main branch after each block, while the model predicts some batches.

    Args:
        model: A model of a toolbox, in eval mode.
        blocks: Blocks of the model, each of which returns (B, *S, C).
        batches: Batches of a data loader.

    Returns:
        For each block the variance of its output over all tokens, averaged over the channels. Tokens of the padding of
        a batch count too.
    """
    variances = {name: ChannelVariance() for name in blocks}
    hooks = [
        block.register_forward_hook(lambda _, args, out, variance=variances[name]: variance.add(out))
        for name, block in blocks.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model.test_step(batch)
    for hook in hooks:
        hook.remove()
    return {name: variance.mean() for name, variance in variances.items()}


def load_model(cfg: Config, checkpoint: str | None) -> nn.Module:
    """The model of a config in eval mode, with the weights of a checkpoint, or those that a training starts from."""
    torch.manual_seed(0)
    model = build_model(cfg)
    if checkpoint:
        load_checkpoint(model, checkpoint, map_location='cpu')
    else:
        MMLogger.get_current_instance().setLevel(logging.WARNING)  # mmengine logs each parameter
        model.init_weights()
    return model


def data_batches(cfg: Config, number: int) -> Iterable[dict]:
    """The first batches of the test set."""
    # data workers would go on loading
    loader = dict(cfg.test_dataloader, num_workers=0, persistent_workers=False)
    return itertools.islice(Runner.build_dataloader(loader, seed=0), number)


# ---------------------------------------------------------------- output


def draw(names: Sequence[str], amplitudes: Sequence[dict[str, float]]) -> Figure:
    """Draw the amplitudes of some models by depth."""
    figure = Figure(figsize=(6.4, 4), layout='constrained')  # without pyplot, which may need a display
    axes = figure.subplots()
    for name, blocks in zip(names, amplitudes, strict=True):
        axes.plot(range(1, len(blocks) + 1), list(blocks.values()), marker='.', linewidth=1, label=name)
    axes.set(xlabel='block', ylabel='variance of the main branch', yscale='log')
    axes.legend()
    return figure


def report(name: str, amplitudes: dict[str, float]) -> str:
    """Text: smallest and largest amplitude of a model, and all amplitudes with a line per stage."""
    low, high = min(amplitudes.values()), max(amplitudes.values())
    lines = [f'{name}: {len(amplitudes)} blocks, variance {low:.4g} to {high:.4g}']
    for stage, blocks in itertools.groupby(amplitudes, key=lambda block: block.rpartition('.')[0]):
        lines.append(f'  {stage}: {" ".join(f"{amplitudes[block]:.4g}" for block in blocks)}')
    return '\n'.join(lines)


# ---------------------------------------------------------------- command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', nargs='?', help='weights of the whole model (default: init_cfg of the config)')
    parser.add_argument(
        '--compare',
        nargs='+',
        action='append',
        default=[],
        metavar=('CONFIG', 'CHECKPOINT'),
        help='config, and checkpoint if any, of another model; may be repeated',
    )
    parser.add_argument('--legend', nargs='+', metavar='NAME', help='name of each model (default: config, checkpoint)')
    parser.add_argument('--num-batches', type=int, default=8, metavar='N', help='batches of data (default: 8)')
    parser.add_argument(
        '--out', type=Path, default=Path('activation_amplitude.png'), help='picture to write (default: %(default)s)'
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write all numbers to this file')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='change all configs: key=value')
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> list[tuple[Config, str | None]]:
    """Check the arguments, and read and check the configs; returns each config and its checkpoint.

    Raises:
        ImportError: A toolbox or a package that a config needs is not installed.
        OSError: Data, a config or a checkpoint is missing, or a result cannot be written.
        ValueError: An argument or a config is wrong.
    """
    check_picture(args.out)
    check_outputs(args.json)
    if args.num_batches < 1:
        raise ValueError(f'--num-batches must be at least 1, got {args.num_batches}')
    models = [(args.config, args.checkpoint)]
    for config, *checkpoint in args.compare:
        if len(checkpoint) > 1:
            raise ValueError(f'--compare takes a config and a checkpoint, got {" ".join([config, *checkpoint])}')
        models.append((config, *(checkpoint or [None])))
    if args.legend and len(args.legend) != len(models):
        raise ValueError(f'--legend must name {len(models)} models, got {len(args.legend)}')
    return [(check_config(config, checkpoint, args.cfg_options), checkpoint) for config, checkpoint in models]


def check_config(path: str, checkpoint: str | None, cfg_options: dict | None) -> Config:
    """Read a config, and check it before its model is built.

    Raises:
        ImportError: See `check`.
        OSError: See `check`.
        ValueError: See `check`.
    """
    cfg = launch.load_config(path, cfg_options)
    toolbox(cfg)
    classes.check_classes(cfg)
    if not cfg.get('test_dataloader'):
        raise ValueError(f'{path} has no test_dataloader, whose data the model is run on')
    checks.check_data(cfg, ['test'])
    checks.check_transforms(cfg, ['test'])
    checks.check_checkpoint(checkpoint, 'CHECKPOINT')
    if not checkpoint:
        checks.check_init_cfg(cfg)
    return cfg


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with launch.one_line_errors(ImportError, OSError, ValueError):
        models = check(args)
    paths = [(args.config, args.checkpoint), *args.compare]
    names = args.legend or [', '.join(Path(path).stem for path in pair if path) for pair in paths]
    results = []
    for name, (cfg, checkpoint) in zip(names, models, strict=True):
        model = load_model(cfg, checkpoint)
        with launch.one_line_errors(ValueError):
            blocks = find_blocks(model)
        amplitudes = record_amplitudes(model, blocks, data_batches(cfg, args.num_batches))
        print(report(name, amplitudes), flush=True)
        results.append(dict(name=name, config=cfg.filename, checkpoint=checkpoint, variance=amplitudes))
    draw(names, [result['variance'] for result in results]).savefig(args.out, dpi=200)
    print(args.out)
    if args.json:
        write_whole(args.json, json.dumps(results, indent=2) + '\n')
        print(args.json)


if __name__ == '__main__':
    main()
