"""Speed and memory of whole Swin V2 backbones: compared with timm, transformers and torchvision.

python benchmarks/benchmark_backbone.py --json backbone.json --plot backbone.png
python benchmarks/benchmark_backbone.py --shapes b_w24_384 --modes inference --implementations 'ours sdpa*' 'timm*'
python benchmarks/benchmark_backbone.py --ablation --shapes b_w16_256

What is measured is the forward pass up to the last stage's features (`inference`), that and the backward pass
(`forward_backward`), and both with a step of AdamW (`step`), without drop path. `timm sdpa` is timm with its attention
rewritten to use F.scaled_dot_product_attention. All implementations are timed interleaved in one process. First the
features of each, and in training two gradients, are compared with those of our reference in float64 with the same
weights: the error columns give the largest difference relative to the largest value. An implementation whose errors
rounding does not explain is WRONG and is not timed. One that cannot run has the reason in its row.

The table gives the median and the interquartile range of a step's time; peak memory of a step, without weights and
optimizer state; the share of the device's peak, for the FLOP of the model without padding, three times as many in
training; and the compilation time in seconds. The peak is that of the data sheet for known GPUs in half precision, and
the measured rate of a large matrix product in float32 for others and for CPUs. `--shapes nano` is for trying it out.

`--ablation` measures the effect of each change: timm, then ours with the position bias computed as there, and from
there one change after another.
"""

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from cases import Case, Implementation, choose
from harness import add_arguments, check_arguments, run
from implementations import all_implementations, backbone_families
from measure import DEVICE
from shapes import DTYPES, SHAPES, default_batch
from torch import Tensor, nn

from swinv2_mm.cli.errors import one_line_errors
from swinv2_mm.models.attention import WindowAttention
from swinv2_mm.models.log_cpb import LogCPB
from swinv2_mm.ops import reference
from swinv2_mm.ops.coordinates import log_spaced_coords
from swinv2_mm.ops.window_attention import BACKENDS, Backend

SIGMOID_LATE = 'sigmoid after the gather'


def case(name: str, batch: int | None, implementations: list[Implementation]) -> Case:
    """A backbone and its input."""
    shape = SHAPES[name]
    batch = batch or default_batch(shape, DEVICE)
    last = len(shape.depths) - 1
    return Case(
        name,
        (batch, 3, *shape.size),
        (batch, math.prod(shape.spatial_shape(last)), shape.dim(last)),
        shape.flops(),
        tuple(batch * shape.logits(i) for i, depth in enumerate(shape.depths) for _ in range(depth)),
        backbone_families(shape),
        implementations,
    )


# ---------------------------------------------------------------- ablation


class RawCPB(LogCPB):
    """The output of the MLP before the sigmoid, computed on each call."""

    def forward(self) -> Tensor:
        """Logits of every relative position: (heads, prod(2 * window - 1))."""
        coords = log_spaced_coords(self.window_size, self.pretrained_window_size).to(self[0].weight.dtype)
        return self[2](F.relu(self[0](coords))).T


class UncachedCPB(LogCPB):
    """The position bias, computed on each call with autograd."""

    def _is_plain(self) -> bool:
        return False


def attend_with_sigmoid(*args, **kwargs) -> Tensor:
    """The reference with the sigmoid of the position bias after the gather; the table is the output of `RawCPB`."""
    attention = reference._attention

    def with_sigmoid(qkv: Tensor, logit_scale: Tensor, bias: Tensor, regions: Tensor | None) -> Tensor:
        return attention(qkv, logit_scale, 16 * bias.sigmoid(), regions)

    with mock.patch.object(reference, '_attention', with_sigmoid):
        return reference.reference_window_attention(*args, **kwargs)


def use_bias(kind: type[LogCPB], backend: str) -> Callable[[nn.Module], None]:
    """A function that replaces the position bias module of our model."""

    def prepare(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, LogCPB):
                module.__class__ = kind
            elif isinstance(module, WindowAttention):
                module.backend = backend

    return prepare


def ablation(dtype: torch.dtype) -> list[Implementation]:
    """Implementations that each add one change to the one before."""
    known = {i.name: i for i in all_implementations(dtype, ())}
    fused = [name for name in reversed(BACKENDS) if name not in ('reference', SIGMOID_LATE)]
    return [
        known['timm eager'],
        Implementation('ours, sigmoid after the gather', 'ours', use_bias(RawCPB, SIGMOID_LATE)),
        Implementation('sigmoid before the gather', 'ours', use_bias(UncachedCPB, 'reference')),
        known['ours reference eager'],  # with its bias cached
        *(known[f'ours {name} eager'] for name in fused),
        *(known[f'ours {name} compiled'] for name in fused),
    ]


# ---------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument('--ablation', action='store_true', help='measure the effect of each change')
    args = parser.parse_args(argv)
    with one_line_errors(OSError, ValueError):
        check_arguments(args)
        dtype = DTYPES[args.dtype]
        all_peers = 'transformers', 'torchvision'
        implementations = ablation(dtype) if args.ablation else all_implementations(dtype, all_peers)
        implementations = choose(implementations, args.implementations)
    late = Backend(attend_with_sigmoid, lambda qkv: None)
    with mock.patch.dict(BACKENDS, {SIGMOID_LATE: late} if args.ablation else {}):
        run(args, [functools.partial(case, name, args.batch, implementations) for name in args.shapes])


if __name__ == '__main__':
    main()
