"""What TerminateOnNonFiniteHook costs: training steps of a backbone with and without it.

python benchmarks/benchmark_hook.py --shape t_w8_256 --rounds 20

A step is the forward pass, the backward pass and AdamW, in float32. Each round times a step without the hook and one
with it, on the same model. `ratio` is the median of the ratios of all rounds, and `IQR` their spread. The hook reads
all gradients once: its share is largest for small inputs. The clock waits for the GPU after each step; a training does
not, so there the hook, which waits too, may cost more.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from measure import DEVICE, time_interleaved
from mmengine.optim import OptimWrapper
from ours import build_backbone
from shapes import SHAPES, default_batch
from torch.utils.benchmark import Measurement, TaskSpec

from swinv2_mm.cli.errors import one_line_errors
from swinv2_mm.engine import TerminateOnNonFiniteHook


def steps(name: str) -> list[Callable[[], None]]:
    """A training step without the hook, and one with it."""
    shape = SHAPES[name]
    model = build_backbone(shape).to(DEVICE).train()
    images = torch.randn(default_batch(shape, DEVICE), 3, *shape.size, device=DEVICE)
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-6))

    def step(backward: Callable) -> None:
        backward(model(images)[0].square().mean())
        wrapper.step()
        wrapper.zero_grad()

    plain = wrapper.backward
    TerminateOnNonFiniteHook().before_train(SimpleNamespace(model=model, optim_wrapper=wrapper))
    return [functools.partial(step, plain), functools.partial(step, wrapper.backward)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shape', choices=SHAPES, default='t_w8_256', help='default: %(default)s')
    parser.add_argument('--rounds', type=int, default=20, help='default: %(default)s')
    args = parser.parse_args(argv)
    with one_line_errors(ValueError):
        if args.rounds < 1:
            raise ValueError(f'--rounds must be at least 1, got {args.rounds}')
    both = steps(args.shape)
    time_interleaved(both, 2)  # warms up
    without, with_hook = time_interleaved(both, args.rounds)
    ratios = [b / a for a, b in zip(without.times, with_hook.times, strict=True)]
    ratio = Measurement(1, ratios, TaskSpec('ratio', ''))
    print('| shape | without, ms | with, ms | ratio | IQR |\n|---|---|---|---|---|')
    print(f'| {args.shape} | {1000 * without.median:.1f} | {1000 * with_hook.median:.1f}', end=' | ')
    print(f'{ratio.median:.4f} | {ratio.iqr:.4f} |')


if __name__ == '__main__':
    main()
