"""FLOPs and parameters of a detector, a segmentor or a video recognizer, part by part, for an input of a given shape.

python tools/analysis_tools/get_flops.py configs/det/htc_swinv2_t.py --shape 800 1280
python tools/analysis_tools/get_flops.py configs/video/swinv2_t_k400_224x224x32.py --shape 32 224 224

One FLOP is one multiply-add, as in Microsoft's tables of Swin and in the toolboxes' own scripts; a norm counts 5 for
each element. What is counted is one forward pass of backbone, neck and heads, for video on one view, traced by
mmengine.analysis, without post-processing.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from mmengine.analysis import FlopAnalyzer, parameter_count
from mmengine.analysis.jit_handles import get_shape
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import get_object_from_string
from torch import Tensor, nn

import swinv2_mm  # noqa: F401  before any toolbox: it mends what is broken in this environment
from swinv2_mm.cli import classes, launch
from swinv2_mm.models.attention import WindowAttention

DATA_SAMPLES = {
    'mmdet': 'mmdet.structures.DetDataSample',
    'mmseg': 'mmseg.structures.SegDataSample',
    'mmaction': 'mmaction.structures.ActionDataSample',
}
DEFAULT_SHAPES = {'mmdet': [800, 1280], 'mmseg': [1024, 2048], 'mmaction': [224, 224]}
DEFAULT_CLIP = [32, 224, 224]  # for video models with an axis for time
REST = 'in between'  # what is computed outside of the parts
REGIONS = (10, 20)  # numbers of proposals that a two-stage detector is traced with


@dataclass
class Complexity:
    """What a model costs.

    Attributes:
        parts: Name, FLOPs and parameters of backbone, neck, heads and whatever else is counted.
        uncounted: Operations with products of their own that have no rule to count them.
        regions: Regions of interest that the parts of a two-stage detector are counted for, by 'proposals' and 'masks'.
        skipped: Why heads are left out, or '' if they are not.
    """

    parts: list[tuple[str, int, int]]
    uncounted: list[str]
    regions: dict[str, int]
    skipped: str = ''


# ---------------------------------------------------------------- models and inputs


def toolbox(cfg: Config) -> str:
    """Toolbox of a config.

    Raises:
        ValueError: The config names none of the three.
    """
    scope = cfg.get('default_scope')
    if scope not in DATA_SAMPLES:
        raise ValueError(f'default_scope of the config must be one of {", ".join(DATA_SAMPLES)}, got {scope!r}')
    return scope


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config in eval mode, on the GPU if there is one. No checkpoint is loaded."""
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    return model.cuda() if torch.cuda.is_available() else model


def input_shape(cfg: Config, shape: list[int] | None) -> tuple[int, ...]:
    """Shape of one sample's input, before preprocessing, from the numbers of `--shape`.

    Args:
        cfg: The config; a video model takes (clips, C, T, H, W) or (frames, C, H, W), as its `format_shape` says.
        shape: A side, H W, or for video T H W, or for video the whole shape. None for the toolbox's usual one.

    Returns:
        (C, H, W) for images, else what the video model takes.

    Raises:
        ValueError: The numbers do not fit the toolbox or the model.
    """
    scope = toolbox(cfg)
    three_axes = (cfg.model.get('data_preprocessor') or {}).get('format_shape', 'NCHW') == 'NCTHW'
    given = shape or (DEFAULT_CLIP if scope == 'mmaction' and three_axes else DEFAULT_SHAPES[scope])
    if min(given) < 1:
        raise ValueError(f'--shape must be positive numbers, got {_join(given)}')
    size = given * 2 if len(given) == 1 else given
    channels = cfg.model.get('backbone', {}).get('in_channels', 3)
    if scope != 'mmaction':
        if len(size) != 2:
            raise ValueError(f'--shape of an image takes one or two numbers (H W), got {_join(given)}')
        return (channels, *size)
    whole = 5 if three_axes else 4
    if len(size) == whole:
        return tuple(size)
    if len(size) not in ((3,) if three_axes else (2, 3)):
        kind = 'T H W' if three_axes else 'H W, or T H W for T frames'
        raise ValueError(f'--shape of this video model takes {kind}, or all {whole} axes, got {_join(given)}')
    frames, size = (size[0] if len(size) == 3 else 1), tuple(size[-2:])
    return (1, channels, frames, *size) if three_axes else (frames, channels, *size)


def random_data(cfg: Config, shape: tuple[int, ...]) -> dict[str, list]:
    """One random sample as a data loader gives it: uint8 (C, H, W), or the shape of a video, and its data sample.

    A video is of the first class, so that a training can take it; objects and segments it would need are not made up.
    """
    sample = get_object_from_string(DATA_SAMPLES[cfg.default_scope])()
    size = shape[-2:]
    sample.set_metainfo(dict(img_id=0, ori_shape=size, img_shape=size, pad_shape=size, scale_factor=(1.0, 1.0)))
    if cfg.default_scope == 'mmaction':
        sample.set_gt_label(0)
    return dict(inputs=[torch.randint(0, 256, shape, dtype=torch.uint8)], data_samples=[sample])


# ---------------------------------------------------------------- counting


def complexity(cfg: Config, shape: tuple[int, ...]) -> Complexity:
    """Count FLOPs and parameters of a config's model for one input.

    Two-stage detectors are counted for as many proposals and masks as their config keeps at most. Heads that cannot be
    traced are left out, and so are auxiliary heads, which predict nothing.

    Args:
        cfg: A config of mmdet, mmseg or mmaction.
        shape: What `input_shape` returns.
    """
    torch.manual_seed(0)
    model = build_model(cfg)
    model.auxiliary_head = None
    for module in model.modules():
        if isinstance(module, WindowAttention):  # the tracer sees into no kernel and no checkpoint
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
    return type(model).forward(model, inputs, samples, mode='tensor')


def _count(model: nn.Module, inputs: Tensor, forward: Callable) -> Complexity:
    """Trace all of a model; regions of interest are few, and the figures those of as many as the config keeps."""
    rpn = (getattr(model, 'rpn_head', None) if hasattr(model, 'roi_head') else None) or nn.Identity()
    if 'max_per_img' not in (getattr(rpn, 'test_cfg', None) or {}):
        flops, uncounted = _trace(model, inputs, forward)
        return Complexity(_rows(model, flops), uncounted, {})
    regions = dict(proposals=rpn.test_cfg.max_per_img)
    if getattr(model.roi_head, 'with_mask', False):
        regions['masks'] = min(model.roi_head.test_cfg.max_per_img, regions['proposals'])
    # how many survive NMS depends on the weights, which are random here: it is to suppress none
    rpn.test_cfg.nms = dict(type='nms', iou_threshold=1.0)
    traces = []
    for number in REGIONS:
        rpn.test_cfg.max_per_img = number
        traces.append(_trace(model, inputs, forward))
    (few, uncounted), (more, _) = traces
    flops = {name: few[name] + (more[name] - few[name]) * _times(name, regions) for name in few}
    return Complexity(_rows(model, flops), uncounted, regions)


def _times(name: str, regions: dict[str, int]) -> float:
    """How often the step from the first to the second number of `REGIONS` leads to what a part is counted for."""
    few, more = REGIONS
    return (regions['masks' if name.startswith('roi_head.mask') else 'proposals'] - few) / (more - few)


def _trace(model: nn.Module, inputs: Tensor, forward: Callable) -> tuple[dict[str, int], list[str]]:
    """FLOPs of each part of the model, and the operations that have no rule but are worth counting."""
    model.forward = lambda x: tuple(_tensors(forward(x)))
    analyzer = FlopAnalyzer(model, (inputs,)).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analyzer.set_op_handle('aten::scaled_dot_product_attention', _attention_flops)
    try:
        with torch.no_grad():
            by_module = analyzer.by_module()
    finally:
        del model.forward
    flops = {name: by_module[name] for name in _part_names(model)}
    flops[REST] = by_module[''] - sum(flops.values())
    return flops, sorted(op.split('.')[-1].split('::')[-1] for op in analyzer.unsupported_ops() if _has_products(op))


def _attention_flops(inputs: list, outputs: list) -> float:
    """Products of queries (..., L, C) with keys (..., S, C), and of what that gives with values (..., S, C)."""
    *batch, queries, channels = get_shape(inputs[0])
    return 2 * math.prod(batch) * queries * get_shape(inputs[1])[-2] * channels


def _has_products(operation: str) -> bool:
    """Whether an operation is more than element-wise arithmetic, a reduction or a copy: custom ones may well be."""
    if operation.startswith(('aten::', 'prim::')) and not operation.startswith('prim::PythonOp'):
        return any(word in operation for word in ('attention', 'conv', 'dot', 'einsum', 'fft', 'mm'))
    return True


def _part_names(model: nn.Module) -> list[str]:
    """The children of the model, and in place of a RoI head its own children."""
    names = [name for name, _ in model.named_children() if name != 'roi_head']
    return names + [f'roi_head.{name}' for name, _ in getattr(model, 'roi_head', nn.Identity()).named_children()]


def _rows(model: nn.Module, flops: dict[str, float]) -> list[tuple[str, int, int]]:
    parameters = parameter_count(model)
    parameters[REST] = parameters[''] - sum(parameters[name] for name in _part_names(model))
    return [(name, round(flops[name]), parameters[name]) for name in flops if flops[name] or parameters[name]]


def _tensors(output) -> Iterator[Tensor]:
    """Tensors of a nested output; the tracer knows no other kind."""
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


def _join(numbers) -> str:
    return ' '.join(map(str, numbers))


def report(result: Complexity, shape: tuple[int, ...]) -> str:
    """Text of the result: a row per part, the total, and what it leaves out."""
    rows = [*result.parts, ('total', sum(part[1] for part in result.parts), sum(part[2] for part in result.parts))]
    width = max(len(row[0]) for row in rows) + 2
    lines = [f'Input shape: {_join(shape)}', f'{"":<{width}}{"Flops":>12}{"Params":>12}']
    lines += [f'{name:<{width}}{_format(flops):>12}{_format(params):>12}' for name, flops, params in rows]
    lines.append('One FLOP is one multiply-add; norms count 5 for each element, other element-wise operations nothing.')
    if result.regions:
        lines.append(f'Counted for {" and ".join(f"{n} {kind}" for kind, n in result.regions.items())}.')
    if result.skipped:
        lines.append(f'The heads are not counted, because they cannot be traced ({result.skipped}).')
    if result.uncounted:
        lines.append(f'Not counted, for want of a rule: {", ".join(result.uncounted)}.')
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
        '(default: 800 1280 for mmdet, 1024 2048 for mmseg, 32 224 224 for clips, 224 224 for frames)',
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
