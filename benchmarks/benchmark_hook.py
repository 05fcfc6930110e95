"""What TerminateOnNonFiniteHook adds to a training step of a backbone.

python benchmarks/benchmark_hook.py --shape t_w8_256 --rounds 20

A step is the forward pass, the backward pass and AdamW, in float32. Each round times a step without the hook, and then
the check that the hook runs after the backward pass, on the same gradients. The times are medians, and `share` is the
median of check / step, with its IQR. It is measured in this way because steps with and without the hook differ by less
than two equal steps do on a shared machine. The check reads all gradients once: its share is largest for small inputs.
On a GPU the hook also waits for the backward pass before the next kernels are launched; the figures are without that.
"""

import argparse
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from measure import DEVICE, time_interleaved
from ours import build_backbone
from shapes import SHAPES, default_batch
from torch.utils.benchmark import Measurement, TaskSpec

from swinv2_mm.cli.errors import one_line_errors
from swinv2_mm.engine import TerminateOnNonFiniteHook


def step_and_check(name: str) -> list[Callable[[], None]]:
    """A training step that keeps its gradients, and the check of these gradients."""
    shape = SHAPES[name]
    model = build_backbone(shape).to(DEVICE).train()
    images = torch.randn(default_batch(shape, DEVICE), 3, *shape.size, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        model(images)[0].square().mean().backward()
        optimizer.step()

    wrapper = SimpleNamespace(backward=lambda loss: None)  # leaves only what the hook adds
    TerminateOnNonFiniteHook().before_train(SimpleNamespace(model=model, optim_wrapper=wrapper))
    loss = torch.ones((), device=DEVICE)
    return [step, lambda: wrapper.backward(loss)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shape', choices=SHAPES, default='t_w8_256', help='default: %(default)s')
    parser.add_argument('--rounds', type=int, default=20, help='default: %(default)s')
    args = parser.parse_args(argv)
    with one_line_errors(ValueError):
        if args.rounds < 1:
            raise ValueError(f'--rounds must be at least 1, got {args.rounds}')
    calls = step_and_check(args.shape)
    time_interleaved(calls, 2)  # warms up
    step, check = time_interleaved(calls, args.rounds)
    share = Measurement(1, [c / s for s, c in zip(step.times, check.times, strict=True)], TaskSpec('check / step', ''))
    print('| shape | step, ms | check, ms | share, % | IQR, % |\n|---|---|---|---|---|')
    print(f'| {args.shape} | {1000 * step.median:.1f} | {1000 * check.median:.2f}', end=' | ')
    print(f'{100 * share.median:.2f} | {100 * share.iqr:.2f} |')


if __name__ == '__main__':
    main()
