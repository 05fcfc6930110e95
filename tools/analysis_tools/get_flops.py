"""FLOPs and parameters of the parts of a detector, segmentor, classifier or video recognizer, for one input shape.

python tools/analysis_tools/get_flops.py configs/det/htc_swinv2_t.py --shape 800 1280
python tools/analysis_tools/get_flops.py configs/cls/swinv2_b_in1k_256.py --shape 256
python tools/analysis_tools/get_flops.py configs/video/swinv2_t_k400_224x224x32.py --shape 32 224 224

One FLOP is one multiply-add, as in Microsoft's tables of Swin and in the toolboxes' own scripts; a norm counts 5 per
element. Counts one forward pass of backbone, neck and heads without post-processing, for video on one view. Traced by
mmengine.analysis.
"""

import argparse
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from mmengine.analysis import FlopAnalyzer, parameter_count
from mmengine.analysis.jit_handles import get_shape
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

import swinv2_mm  # noqa: F401  before any toolbox: it applies workarounds that the toolboxes' imports need
from swinv2_mm.cli import classes, launch
from swinv2_mm.cli.inputs import input_shape, join_numbers, random_data
from swinv2_mm.models.attention import WindowAttention

REST = 'in between'  # row for operators outside of the parts
REGIONS = (10, 20)  # numbers of proposals with which a two-stage detector is traced


@dataclass
class Complexity:
    """FLOPs and parameters of a model.

    Attributes:
        parts: Name, FLOPs and parameters of each part: backbone, neck, heads and the rest.
        uncounted: Operators with matrix products for which there is no rule to count them.
        regions: Assumed numbers of regions of interest in a two-stage detector, with the keys 'proposals' and 'masks'.
        skipped: Why the heads are not counted, or '' if they are.
    """

    parts: list[tuple[str, int, int]]
    uncounted: list[str]
    regions: dict[str, int]
    skipped: str = ''


# ---------------------------------------------------------------- models


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config in eval mode, on the GPU if there is one. No checkpoint is loaded."""
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    return model.cuda() if torch.cuda.is_available() else model


# ---------------------------------------------------------------- counting


def complexity(cfg: Config, shape: tuple[int, ...]) -> Complexity:
    """Count FLOPs and parameters of a config's model for one input.

    Two-stage detectors are counted for the maximum number of proposals and masks of their config. Heads that cannot be
    traced are not counted, nor are auxiliary heads, which are for training only.

    Args:
        cfg: A config of one of the toolboxes.
        shape: Shape of the input, from `input_shape`.
    """
    torch.manual_seed(0)
    model = build_model(cfg)
    model.auxiliary_head = None
    for module in model.modules():
        if isinstance(module, WindowAttention):  # the tracer cannot look into kernels and activation checkpoints
            module.backend, module.sequential = 'reference', False
    data = model.data_preprocessor(random_data(cfg, shape))
    inputs, samples = data['inputs'], data['data_samples']
    try:
        return _count(model, inputs, lambda x: _forward(model, x, samples))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        skipped = f'{type(error).__name__}: {error}'.splitlines()[0]
    flops, uncounted = _trace(model, inputs, model.extract_feat)
    return Complexity(_rows(model, flops), uncounted, {}, skipped)


def _forward(model: nn.Module, inputs: Tensor, samples: list):
    if hasattr(model, 'cls_head'):  # mmaction's mode='tensor' stops before the head
        return model.extract_feat(inputs, stage='head', data_samples=samples)
    if hasattr(model, 'target_generator'):  # that of mmpretrain's SimMIM before the decoder
        return model.neck(model.extract_feat(inputs)[0])
    head = getattr(model, 'decode_head', None)
    if head and 'batch_data_samples' in inspect.signature(head.forward).parameters:  # Mask2Former
        return head(model.extract_feat(inputs), samples)
    return type(model).forward(model, inputs, samples, mode='tensor')


def _count(model: nn.Module, inputs: Tensor, forward: Callable) -> Complexity:
    """Trace the whole model. The parts of a RoI head are traced with few regions and extrapolated to the config's."""
    rpn = (getattr(model, 'rpn_head', None) if hasattr(model, 'roi_head') else None) or nn.Identity()
    if 'max_per_img' not in (getattr(rpn, 'test_cfg', None) or {}):
        flops, uncounted = _trace(model, inputs, forward)
        return Complexity(_rows(model, flops), uncounted, {})
    regions = dict(proposals=rpn.test_cfg.max_per_img)
    if getattr(model.roi_head, 'with_mask', False):
        regions['masks'] = min(model.roi_head.test_cfg.max_per_img, regions['proposals'])
    # the number of proposals after NMS depends on the weights, which are random: disable suppression
    rpn.test_cfg.nms = dict(type='nms', iou_threshold=1.0)
    traces = []
    for number in REGIONS:
        rpn.test_cfg.max_per_img = number
        traces.append(_trace(model, inputs, forward))
    (few, uncounted), (more, _) = traces
    flops = {name: few[name] + (more[name] - few[name]) * _times(name, regions) for name in few}
    return Complexity(_rows(model, flops), uncounted, regions)


def _times(name: str, regions: dict[str, int]) -> float:
    """Factor of the linear extrapolation from `REGIONS` to the number of regions that a part is counted for."""
    few, more = REGIONS
    return (regions['masks' if name.startswith('roi_head.mask') else 'proposals'] - few) / (more - few)


# mmengine's analyzer, because torch.utils.flop_counter does not count norms
def _trace(model: nn.Module, inputs: Tensor, forward: Callable) -> tuple[dict[str, int], list[str]]:
    """FLOPs of each part of the model, and the operators with matrix products that have no rule."""
    model.forward = lambda x: tuple(_tensors(forward(x)))
    analyzer = FlopAnalyzer(model, (inputs,)).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analyzer.set_op_handle('aten::scaled_dot_product_attention', _attention_flops)
    analyzer.set_op_handle('aten::baddbmm', _baddbmm_flops)
    try:
        with torch.no_grad():
            by_module = analyzer.by_module()
    finally:
        del model.forward
    flops = {name: by_module[name] for name in _part_names(model)}
    flops[REST] = by_module[''] - sum(flops.values())
    return flops, sorted(op.split('.')[-1].split('::')[-1] for op in analyzer.unsupported_ops() if _has_products(op))


def _attention_flops(inputs: list, outputs: list) -> float:
    """FLOPs of q k^T for queries (..., L, C) and keys (..., S, C), and of its product with values (..., S, C)."""
    *batch, queries, channels = get_shape(inputs[0])
    return 2 * math.prod(batch) * queries * get_shape(inputs[1])[-2] * channels


def _baddbmm_flops(inputs: list, outputs: list) -> int:
    """FLOPs of the product in c + a b, for a (B, N, K), b (B, K, M)."""
    return math.prod(get_shape(inputs[1])) * get_shape(inputs[2])[-1]


def _has_products(operation: str) -> bool:
    """Whether an operator may contain matrix products: not element-wise, reduction or copy; custom ones may."""
    if operation.startswith(('aten::', 'prim::')) and not operation.startswith('prim::PythonOp'):
        return any(word in operation for word in ('attention', 'conv', 'dot', 'einsum', 'fft', 'mm'))
    return True


def _part_names(model: nn.Module) -> list[str]:
    """Names of the children of the model, with a RoI head replaced by its own children."""
    names = [name for name, _ in model.named_children() if name != 'roi_head']
    return names + [f'roi_head.{name}' for name, _ in getattr(model, 'roi_head', nn.Identity()).named_children()]


def _rows(model: nn.Module, flops: dict[str, float]) -> list[tuple[str, int, int]]:
    parameters = parameter_count(model)
    parameters[REST] = parameters[''] - sum(parameters[name] for name in _part_names(model))
    return [(name, round(flops[name]), parameters[name]) for name in flops if flops[name] or parameters[name]]


def _tensors(output) -> Iterator[Tensor]:
    """Yield the tensors of a nested output; the tracer accepts nothing else."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))


# ---------------------------------------------------------------- output


def _format(number: int) -> str:
    for unit, name in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'K')):
        if number >= unit:
            return f'{number / unit:.3f} {name}'
    return str(number)


def report(result: Complexity, shape: tuple[int, ...]) -> str:
    """Text of the result: a row per part, the total, and notes on what is not counted."""
    rows = [*result.parts, ('total', sum(part[1] for part in result.parts), sum(part[2] for part in result.parts))]
    width = max(len(row[0]) for row in rows) + 2
    lines = [f'Input shape: {join_numbers(shape)}', f'{"":<{width}}{"Flops":>12}{"Params":>12}']
    lines += [f'{name:<{width}}{_format(flops):>12}{_format(params):>12}' for name, flops, params in rows]
    lines.append('One FLOP is one multiply-add; norms count 5 per element, other element-wise operations 0.')
    if result.regions:
        lines.append(f'Counted for {" and ".join(f"{n} {kind}" for kind, n in result.regions.items())}.')
    if result.skipped:
        lines.append(f'The heads are not counted, because they cannot be traced ({result.skipped}).')
    if result.uncounted:
        lines.append(f'Not counted, because there is no rule: {", ".join(result.uncounted)}.')
    return '\n'.join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='input: one side of a square, H W, or for video T H W or all axes '
        '(default: 800 1280 for mmdet, 1024 2048 for mmseg, 224 224 for mmpretrain and frames, 32 224 224 for clips)',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='change the config: key=value')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with launch.one_line_errors(FileNotFoundError, ModuleNotFoundError, ValueError):
        cfg = launch.load_config(args.config, args.cfg_options)
        shape = input_shape(cfg, args.shape)
        classes.check_classes(cfg, parts=['model'])
    print(report(complexity(cfg, shape), shape))


if __name__ == '__main__':
    main()
