"""Study: which position bias transfers to a larger window without fine-tuning (Table 1 of the paper).

    python projects/window_transfer/study_window_transfer.py --processes 2

It trains a nano UperNet on the scenes of `make_shapes_coco.py` with each of three position biases, and tests it on
larger images with proportionally larger windows. It writes all results as JSON, prints a table and draws a plot. All
else is equal for the three biases: the other initial weights, the order of the images, the recipe, the test images.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from swinv2_mm.engine import SwinV2OptimWrapperConstructor
from swinv2_mm.models.attention import WindowAttention
from swinv2_mm.models.block import SwinBlock
from swinv2_mm.models.log_cpb import LogCPB

ARCH = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16))
PATCH_SIZE = 4
CHANNELS = 24  # of the decoder
CLASSES = (0, 1, 2, 123, 153, 154, 156)  # labels of the scenes: three shapes, four stuff classes
WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # fraction of the steps
SCENE_SEED = 0


# ---------------------------------------------------------------- the position biases


class LinearCPB(nn.Sequential):
    """Linear-spaced continuous position bias: the MLP of Log-CPB on coordinates without the logarithm (Table 1).

    Args:
        log_cpb: The Log-CPB to replace; its layers are reused.
    """

    def __init__(self, log_cpb: LogCPB) -> None:
        super().__init__(*log_cpb)
        self.window_size = log_cpb.window_size
        self.pretrained_window_size = tuple(log_cpb.pretrained_window_size.tolist())

    def forward(self) -> Tensor:
        """Bias of every relative position: (heads, prod(2 * window - 1)), between 0 and 16."""
        sizes = zip(self.window_size, self.pretrained_window_size, strict=True)
        # the largest offset of the training window is 1
        axes = [torch.arange(1 - w, w, dtype=torch.float32) / max(p - 1, 1) for w, p in sizes]
        coords = torch.stack(torch.meshgrid(*axes, indexing='ij'), -1).flatten(0, -2)
        return 16 * super().forward(coords).sigmoid().T


class TableBias(nn.Module):
    """Parameterized position bias, interpolated for larger windows as in Swin V1 (Table 1, "parameterized").

    As in Log-CPB the bias is 16 * sigmoid of the parameters. They start at zero, a bias of 8, as the MLPs nearly do.

    Args:
        log_cpb: The Log-CPB to replace.
    """

    def __init__(self, log_cpb: LogCPB) -> None:
        super().__init__()
        self.window_size = log_cpb.window_size
        self.pretrained_window_size = tuple(log_cpb.pretrained_window_size.tolist())
        heads = log_cpb[2].out_features
        self.table = nn.Parameter(torch.zeros(heads, math.prod(2 * p - 1 for p in self.pretrained_window_size)))

    def forward(self) -> Tensor:
        """Bias of every relative position: (heads, prod(2 * window - 1)), between 0 and 16."""
        bias = 16 * self.table.sigmoid()
        if self.window_size == self.pretrained_window_size:
            return bias
        grid = bias.unflatten(1, [2 * p - 1 for p in self.pretrained_window_size])
        return F.interpolate(grid[None], [2 * w - 1 for w in self.window_size], mode='bicubic')[0].flatten(1)


class NoBias(nn.Module):
    """No position bias, to measure how much a trained model depends on its own.

    Args:
        bias: The module to replace.
    """

    def __init__(self, bias: nn.Module) -> None:
        super().__init__()
        self.register_buffer('zeros', torch.zeros_like(bias().detach()), persistent=False)

    def forward(self) -> Tensor:
        """Zero for every relative position: (heads, prod(2 * window - 1))."""
        return self.zeros


# in the order of Table 1
BIASES = {'table': TableBias, 'linear': LinearCPB, 'log': None}
LABELS = {'table': 'Parameterized', 'linear': 'Linear CPB', 'log': 'Log CPB'}


def attentions(model: nn.Module) -> Iterator[WindowAttention]:
    """All attention modules of a model, in the order of the blocks."""
    return (module for module in model.modules() if isinstance(module, WindowAttention))


def replace_bias(model: nn.Module, kind: Callable[[nn.Module], nn.Module]) -> None:
    """Replace the position bias of every block."""
    for attention in attentions(model):
        attention.cpb_mlp = kind(attention.cpb_mlp)


# ---------------------------------------------------------------- the model


def stage_windows(size: int, window: int) -> tuple[int, ...]:
    """Window of each stage: `window`, but no larger than the feature map."""
    sides = (size // (PATCH_SIZE * 2**stage) for stage in range(len(ARCH['depths'])))
    return tuple(min(window, tokens) for tokens in sides)


def build_model(bias: str, seed: int, windows: Sequence[int], trained_windows: Sequence[int]) -> nn.Module:
    """Build a nano UperNet. For one seed, all weights except those of the bias are the same with each bias.

    Args:
        bias: A key of `BIASES`.
        seed: Seed of the weights.
        windows: Window of each stage.
        trained_windows: Window of each stage in training.
    """
    import mmseg.models  # noqa: F401  fills the registry
    from mmseg.registry import MODELS

    dims = [ARCH['embed_dims'] * 2**stage for stage in range(len(ARCH['depths']))]
    backbone = dict(
        type='swinv2_mm.SwinTransformerV2',
        arch=ARCH,
        patch_size=PATCH_SIZE,
        window_size=windows,
        pretrained_window_sizes=trained_windows,
        drop_path_rate=0.0,
    )
    head = dict(
        type='UPerHead',
        in_channels=dims,
        in_index=list(range(len(dims))),
        channels=CHANNELS,
        num_classes=len(CLASSES),
        dropout_ratio=0.0,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss'),
    )
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(dict(type='EncoderDecoder', backbone=backbone, decode_head=head, test_cfg=dict()))
        model.init_weights()
    for block in model.modules():
        if isinstance(block, SwinBlock):  # zero by default; the training is short
            nn.init.ones_(block.norm1.weight)
            nn.init.ones_(block.norm2.weight)
    if BIASES[bias] is not None:
        replace_bias(model, BIASES[bias])
    return model


def enlarge(model: nn.Module, bias: str, windows: Sequence[int], trained_windows: Sequence[int]) -> nn.Module:
    """Copy the weights of a trained model unchanged into one with larger windows."""
    larger = build_model(bias, 0, windows, trained_windows)
    # not load_state_dict: the backbone rejects weights without Log-CPB, such as those of the table
    source, target = model.state_dict(), larger.state_dict()
    if source.keys() != target.keys():
        raise ValueError(f'only one of the two models has {sorted(source.keys() ^ target.keys())}')
    for name, value in target.items():
        value.copy_(source[name])
    return larger.eval()


# ---------------------------------------------------------------- the scenes


def import_make_scene() -> Callable:
    """Import `make_scene` from `tools/misc/make_shapes_coco.py`."""
    path = Path(__file__).parents[2] / 'tools/misc/make_shapes_coco.py'
    spec = importlib.util.spec_from_file_location('make_shapes_coco', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by its name
    spec.loader.exec_module(module)
    return module.make_scene


def render(split: int, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Render scenes: BGR images (count, size, size, 3) and labels (count, size, size) from 0 to 6, both uint8."""
    make_scene = import_make_scene()
    scenes = [make_scene(np.random.default_rng((SCENE_SEED, split, index)), size) for index in range(count)]
    lookup = np.full(256, 255, np.uint8)
    lookup[list(CLASSES)] = range(len(CLASSES))
    return np.stack([s.image for s in scenes]), lookup[np.stack([s.semantic for s in scenes])]


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resize images (N, H, W, 3) to size x size by area averaging."""
    return np.stack([cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in images])


def resize_labels(labels: np.ndarray, size: int) -> np.ndarray:
    """Resize labels (N, H, W) to size x size by nearest neighbour."""
    return np.stack([cv2.resize(label, (size, size), interpolation=cv2.INTER_NEAREST_EXACT) for label in labels])


def to_input(images: np.ndarray) -> Tensor:
    """Normalize: (N, H, W, 3) uint8 -> (N, 3, H, W), about -2 to 2."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127.5) / 64


def image_sizes(args: argparse.Namespace) -> list[int]:
    """Side of the test images for each factor."""
    return [round(factor * args.size) for factor in args.factors]


def make_data(args: argparse.Namespace) -> dict:
    """Render the scenes once at the largest size, and resize them to the training size and the test sizes.

    Returns:
        'train': images and labels at the training size; 'test': images by size; 'truth': labels at the largest size.
    """
    largest = max(image_sizes(args))
    images, labels = render(0, args.train_images, largest)
    test_images, truth = render(1, args.test_images, largest)
    return {
        'train': (resize(images, args.size), resize_labels(labels, args.size)),
        'test': {size: resize(test_images, size) for size in image_sizes(args)},
        'truth': truth,
    }


# ---------------------------------------------------------------- training and testing


def batches(images: np.ndarray, labels: np.ndarray, size: int, steps: int, seed: int) -> Iterator[tuple]:
    """Training batches with random flips; order and flips depend only on the seed."""
    rng = np.random.default_rng(seed)
    order = np.zeros(0, int)
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, *(rng.permutation(len(images)) for _ in range(-(-size // len(images))))])
        chosen, order = order[:size], order[size:]
        flips = rng.random(size) < 0.5
        x, y = images[chosen], labels[chosen]
        x[flips], y[flips] = x[flips, :, ::-1], y[flips, :, ::-1]
        yield to_input(x), torch.from_numpy(y).long()


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW, without weight decay for the parameters that the configs exempt."""
    adamw = dict(type='AdamW', lr=lr, weight_decay=WEIGHT_DECAY)
    return SwinV2OptimWrapperConstructor(dict(optimizer=adamw))(model).optimizer


def train(model: nn.Module, data: dict, args: argparse.Namespace, seed: int) -> float:
    """Train a model; returns its mean loss over the last tenth of the steps."""
    optimizer = make_optimizer(model.train(), args.lr)
    warm_up = max(round(WARM_UP * args.steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (args.steps - step) / max(args.steps - warm_up, 1))
    )
    losses = []
    for x, y in batches(*data['train'], args.batch_size, args.steps, seed):
        logits = F.interpolate(model(x), y.shape[1:], mode='bilinear')
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses[-max(args.steps // 10, 1) :]))


@torch.no_grad()
def mean_iou(model: nn.Module, images: np.ndarray, truth: np.ndarray, batch_size: int = 4) -> float:
    """MIoU in per cent. Logits are upsampled to the labels, so that all test sizes share the same ground truth."""
    from mmseg.evaluation import IoUMetric

    model.eval()
    areas = [torch.zeros(len(CLASSES)) for _ in range(4)]
    for start in range(0, len(images), batch_size):
        labels = torch.from_numpy(truth[start : start + batch_size])
        logits = F.interpolate(model(to_input(images[start : start + batch_size])), labels.shape[1:], mode='bilinear')
        batch_areas = IoUMetric.intersect_and_union(logits.argmax(1), labels, len(CLASSES), ignore_index=255)
        areas = [total + area for total, area in zip(areas, batch_areas, strict=True)]
    # mean over classes; a class that is in neither labels nor predictions has no IoU
    return 100 * float(np.nanmean(IoUMetric.total_area_to_metrics(*areas, ['mIoU'])['IoU']))


@torch.no_grad()
def bias_spread(model: nn.Module) -> float:
    """Standard deviation of the bias over the relative positions of a window, averaged over heads and blocks."""
    return float(torch.cat([attention.cpb_mlp().std(1) for attention in attentions(model)]).mean())


def run_job(bias: str, seed: int, data: dict, args: argparse.Namespace) -> dict:
    """Train one model and test it at every size, with proportional windows.

    Returns:
        'miou' and 'miou_without_bias' for each factor; 'loss', 'spread', 'seconds'.
    """
    start = time.perf_counter()
    trained = stage_windows(args.size, args.window)
    model = build_model(bias, seed, trained, trained)
    loss = train(model, data, args, seed)
    trained_after = time.perf_counter() - start
    scores, scores_without_bias = [], []
    for factor, size in zip(args.factors, image_sizes(args), strict=True):
        windows = [round(factor * window) for window in trained]
        larger = enlarge(model, bias, windows, trained)
        scores.append(mean_iou(larger, data['test'][size], data['truth']))
        replace_bias(larger, NoBias)
        scores_without_bias.append(mean_iou(larger, data['test'][size], data['truth']))
    seconds = [round(trained_after, 1), round(time.perf_counter() - start - trained_after, 1)]
    return dict(
        bias=bias,
        seed=seed,
        miou=scores,
        miou_without_bias=scores_without_bias,
        loss=loss,
        spread=bias_spread(model),
        seconds=dict(zip(('training', 'testing'), seconds, strict=True)),
    )


_shared: dict = {}


def _start_worker(data: dict, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    MMLogger.get_current_instance().setLevel('WARNING')  # without a line for each initialised weight
    _shared.update(data=data, args=args)


def _run_shared(job: tuple[str, int]) -> dict:
    return run_job(*job, _shared['data'], _shared['args'])


def run_all(args: argparse.Namespace) -> list[dict]:
    """Run every bias with every seed, each job on one thread, `--processes` jobs at a time."""
    jobs = [(bias, seed) for seed in args.seeds for bias in args.biases]
    data = make_data(args)
    results = []
    # also for one job at a time: the number of threads is set in the new process
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(args.processes, context, _start_worker, (data, args)) as pool:
        for result in pool.map(_run_shared, jobs):
            print(describe(result), flush=True)
            results.append(result)
    return results


# ---------------------------------------------------------------- results


def describe(result: dict) -> str:
    """One line for one job."""
    scores = ' '.join(f'{score:.1f}' for score in result['miou'])
    removed = ' '.join(f'{score:.1f}' for score in result['miou_without_bias'])
    seconds = result['seconds']
    return (
        f'{result["bias"]} seed {result["seed"]}: mIoU {scores}; bias removed {removed}; loss {result["loss"]:.3f}; '
        f'spread of the bias {result["spread"]:.2f}; {seconds["training"]:.0f} s training, '
        f'{seconds["testing"]:.0f} s testing'
    )


def scores_of(results: list[dict], bias: str, key: str = 'miou') -> np.ndarray:
    """Scores of all seeds of a bias: (seeds, factors)."""
    return np.array([result[key] for result in results if result['bias'] == bias])


def spread_over_seeds(scores: np.ndarray) -> np.ndarray:
    """Sample standard deviation over seeds (seeds, factors) -> (factors,); zero for a single seed."""
    return scores.std(0, ddof=1) if len(scores) > 1 else np.zeros(scores.shape[1])


def columns(args: argparse.Namespace) -> list[str]:
    """Headings as in Table 1: window of the first stage, image size."""
    windows = [round(factor * args.window) for factor in args.factors]
    return [f'W{window}, I{size}' for window, size in zip(windows, image_sizes(args), strict=True)]


def row(label: str, scores: np.ndarray, reference: np.ndarray | None) -> str:
    """Mean and standard deviation of each column, and the difference to the mean of the reference."""
    cells = [f'{m:.1f} ± {s:.1f}' for m, s in zip(scores.mean(0), spread_over_seeds(scores), strict=True)]
    if reference is not None:
        gains = scores.mean(0) - reference.mean(0)
        cells = [f'{cell} ({gain:+.1f})' for cell, gain in zip(cells, gains, strict=True)]
    return f'| {label} | ' + ' | '.join(cells) + ' |'


def markdown(results: list[dict], args: argparse.Namespace) -> str:
    """Two tables: the scores as in Table 1, then the scores of the same models without their bias."""
    head = ['| mIoU, % | ' + ' | '.join(columns(args)) + ' |', '|---' * (len(args.factors) + 1) + '|']
    lines = list(head)
    for bias in args.biases:
        compare = bias != 'table' and 'table' in args.biases
        lines.append(row(LABELS[bias], scores_of(results, bias), scores_of(results, 'table') if compare else None))
    lines += ['', *head]
    for bias in args.biases:
        lines.append(row(f'{LABELS[bias]}, removed', scores_of(results, bias, 'miou_without_bias'), None))
    return '\n'.join(lines)


def draw(results: list[dict], args: argparse.Namespace) -> Figure:
    """Plot Table 1: a line for each bias over the sizes, and a dot for each seed."""
    figure = Figure(figsize=(6.4, 4.2), layout='constrained')  # not pyplot, which needs a display
    axes = figure.subplots()
    for i, bias in enumerate(args.biases):
        scores = scores_of(results, bias)
        x = np.arange(len(args.factors)) + 0.06 * (i - (len(args.biases) - 1) / 2)  # offset, to avoid overlap
        line = axes.errorbar(
            x, scores.mean(0), spread_over_seeds(scores), marker='o', markersize=5, capsize=3, label=LABELS[bias]
        )
        axes.plot(np.broadcast_to(x, scores.shape).ravel(), scores.ravel(), '.', color=line[0].get_color(), alpha=0.5)
    axes.set_xticks(range(len(args.factors)), columns(args))
    axes.set_xlabel('window and image side at test time; training was at the first')
    axes.set_ylabel('mIoU, %')
    axes.set_title(f'Larger windows without fine-tuning, {len(args.seeds)} seeds each (bars: ± std)', fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and reject sizes that do not scale to whole numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, default: object, text: str, **kwargs: object) -> None:
        parser.add_argument(name, default=default, help=f'{text} (default: %(default)s)', **kwargs)

    add('--out', Path('window_transfer.json'), 'JSON file for the results', type=Path)
    add('--plot', Path('window_transfer.png'), 'file for the plot', type=Path)
    add('--biases', list(BIASES), 'position biases', nargs='+', choices=list(BIASES))
    add('--seeds', [0, 1, 2], 'seeds of weights and batches', nargs='+', type=int)
    add('--factors', [1.0, 1.5, 2.0, 3.0], 'test sizes relative to the training size', nargs='+', type=float)
    add('--size', 64, 'side of the training images, in pixels', type=int)
    add('--window', 4, 'training window, in tokens', type=int)
    add('--steps', 2000, 'training steps', type=int)
    add('--batch-size', 8, 'images per training step', type=int)
    add('--lr', 4e-3, 'learning rate after warm-up', type=float)
    add('--train-images', 1000, 'scenes to train on', type=int)
    add('--test-images', 100, 'scenes to test on', type=int)
    add('--processes', 1, 'parallel jobs, each on one thread', type=int)
    args = parser.parse_args(argv)
    sides = [args.size, *stage_windows(args.size, args.window)]
    if args.size % (PATCH_SIZE * 2 ** (len(ARCH['depths']) - 1)) or any(f * s % 1 for f in args.factors for s in sides):
        parser.error(f'image and windows must be whole numbers at every stage and factor; at factor 1 they are {sides}')
    if min(args.factors) < 1:
        parser.error(f'--factors must be at least 1, got {min(args.factors)}')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study."""
    args = parse_args(argv)
    results = run_all(args)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    args.out.write_text(json.dumps({'settings': settings, 'results': results}, indent=1))
    draw(results, args).savefig(args.plot, dpi=150)
    print(f'\n{markdown(results, args)}\n\n{args.out}\n{args.plot}')


if __name__ == '__main__':
    main()
