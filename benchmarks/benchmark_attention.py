"""Speed and memory of the attention half of a Swin V2 block, compared with timm and torchvision, stage by stage.

python benchmarks/benchmark_attention.py --json attention.json --plot attention.png
python benchmarks/benchmark_attention.py --shapes g_block_1536_w32 --modes inference

It maps features (B, *S, C) to features (B, *S, C): shift, window partition, projection to queries, keys and values,
attention, output projection, and the reverse of partition and shift. The windows are shifted wherever a feature map has
more than one. Everything else, and the table, is as in benchmark_backbone.py. `g_block_1536_w32` is one block of the
first stage of SwinV2-G at 1536x1536; on a CPU it runs only if it is named. `--shapes nano` is for trying it out.
"""

import argparse
import functools
import math
from collections.abc import Sequence

from cases import Case, Implementation, choose
from harness import add_arguments, check_arguments, run
from implementations import all_implementations, attention_families
from measure import DEVICE
from shapes import DTYPES, SHAPES, default_batch

from swinv2_mm.cli.errors import one_line_errors


def case(name: str, stage: int, batch: int | None, implementations: list[Implementation]) -> Case:
    """The attention half of a block of a stage, and its input."""
    shape = SHAPES[name]
    batch = batch or default_batch(shape, DEVICE)
    spatial_shape, dim = shape.spatial_shape(stage), shape.dim(stage)
    return Case(
        f'{name} stage {stage + 1}',
        (batch, *spatial_shape, dim),
        (batch, math.prod(spatial_shape), dim),
        shape.attention_flops(stage),
        (batch * shape.logits(stage),),
        attention_families(shape, stage),
        implementations,
        input_grad=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args(argv)
    with one_line_errors(OSError, ValueError):
        check_arguments(args)
        implementations = choose(all_implementations(DTYPES[args.dtype], ('torchvision',)), args.implementations)
    stages = [(name, stage) for name in args.shapes for stage in range(len(SHAPES[name].depths))]
    run(args, [functools.partial(case, name, stage, args.batch, implementations) for name, stage in stages])


if __name__ == '__main__':
    main()
