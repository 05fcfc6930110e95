"""Speed and memory of the attention half of a Swin V2 block, ours beside timm and torchvision, stage by stage.

python benchmarks/benchmark_attention.py --json attention.json --plot attention.png
python benchmarks/benchmark_attention.py --shapes g_block_1536_w32 --modes inference

It goes from a map (B, *S, C) to a map (B, *S, C): shift, windows, projection to queries, keys and values, attention,
projection, and back. The windows are shifted wherever a map has more than one. Everything else is as in
benchmark_backbone.py, whose table and columns these are. `g_block_1536_w32` is one block of the first stage of SwinV2-G
at 1536x1536; on a CPU it runs only if it is named. `--shapes nano` is for trying it out.
"""

import argparse
import functools
from collections.abc import Sequence

import peers
from side_by_side import (
    DTYPES,
    SHAPES,
    Case,
    Contender,
    add_arguments,
    check_arguments,
    choose,
    default_batch,
    run,
)

from swinv2_mm.cli.errors import one_line_errors


def case(name: str, stage: int, batch: int | None, contenders: list[Contender]) -> Case:
    """The attention half of a block of a stage, and its input."""
    shape = SHAPES[name]
    batch = batch or default_batch(shape)
    return Case(
        f'{name} stage {stage + 1}',
        (batch, *shape.map_size(stage), shape.dim(stage)),
        shape.attention_flops(stage),
        (batch * shape.logits(stage),),
        peers.attention_families(shape, stage),
        contenders,
        input_grad=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args(argv)
    with one_line_errors(OSError, ValueError):
        check_arguments(args)
        contenders = choose(peers.contenders(DTYPES[args.dtype], ('torchvision',)), args.contenders)
    stages = [(name, stage) for name in args.shapes for stage in range(len(SHAPES[name].depths))]
    run(args, [functools.partial(case, name, stage, args.batch, contenders) for name, stage in stages])


if __name__ == '__main__':
    main()
