"""Study: position biases at larger windows, pre-norm and dot-product attention (Tables 1 and 6 of the paper).

    python projects/ablations/study_ablations.py --processes 2

It trains a nano Swin V2 and its rivals on a task whose label needs position, and tests each on larger images with
proportionally larger windows, without fine-tuning. It writes all results as JSON, prints two tables and draws a plot.
All else is equal for the rivals: the other initial weights, the scenes and their order, the recipe.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rivals
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mmengine.logging import MMLogger
from scenes import DIRECTIONS, Scenes, make_scenes, render
from torch import Tensor, nn

from swinv2_mm.engine import SwinV2OptimWrapperConstructor
from swinv2_mm.models import SwinTransformerV2

ARCH = dict(embed_dims=32, depths=(2, 2), num_heads=(4, 8))
PATCH_SIZE = 4
WINDOWS = 2  # of the first stage along a side of the image; the last stage is one window, as in the paper
WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # fraction of the steps
TRAIN_SCENES, TEST_SCENES = 0, 1  # seeds


class Variant(NamedTuple):
    """A model of the study."""

    label: str
    bias: Callable[[nn.Module], nn.Module] | None = None  # replaces Log-CPB
    dot_product: bool = False
    pre_norm: bool = False


VARIANTS = {
    'none': Variant('No bias', rivals.NoBias),
    'table': Variant('Parameterized', rivals.TableBias),
    'linear': Variant('Linear CPB', rivals.LinearCPB),
    'log': Variant('Log CPB'),
    # with the parameterized bias, which Table 6 seems to have: its last row is the first of Table 1
    'dot': Variant('Parameterized, dot product', rivals.TableBias, dot_product=True),
    'pre_dot': Variant('Parameterized, dot product, pre-norm', rivals.TableBias, dot_product=True, pre_norm=True),
}


class Classifier(nn.Module):
    """A nano Swin V2 with average pooling and a linear head.

    Args:
        window: Window of both stages.
        trained_window: Window in training.
    """

    def __init__(self, window: int, trained_window: int) -> None:
        super().__init__()
        self.backbone = SwinTransformerV2(
            ARCH,
            window_size=window,
            pretrained_window_sizes=trained_window,
            patch_size=PATCH_SIZE,
            drop_path_rate=0.0,
            out_indices=(len(ARCH['depths']) - 1,),
        )
        self.head = nn.Linear(self.backbone.num_features[-1], DIRECTIONS)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, directions)."""
        (feature_map,) = self.backbone(x)
        return self.head(feature_map.mean((2, 3)))


def build_model(variant: Variant, seed: int, window: int, trained_window: int) -> Classifier:
    """Build a model. For one seed, all weights except those of the bias are the same in each variant."""
    torch.manual_seed(seed)
    model = Classifier(window, trained_window)
    for block in rivals.blocks(model):  # zero by default; the training is short, and pre-norm needs ones
        nn.init.ones_(block.norm1.weight)
        nn.init.ones_(block.norm2.weight)
    if variant.bias:
        rivals.replace_bias(model, variant.bias)
    if variant.dot_product:
        rivals.use_dot_product(model)
    if variant.pre_norm:
        rivals.use_pre_norm(model)
    return model


def enlarge(model: Classifier, variant: Variant, window: int, trained_window: int) -> Classifier:
    """Copy the weights of a trained model unchanged into one with a larger window."""
    larger = build_model(variant, 0, window, trained_window)
    # not load_state_dict: the backbone rejects weights without Log-CPB, such as those of the rivals
    source, target = model.state_dict(), larger.state_dict()
    if source.keys() != target.keys():
        raise ValueError(f'only one of the two models has {sorted(source.keys() ^ target.keys())}')
    for name, value in target.items():
        value.copy_(source[name])
    return larger.eval()


# ---------------------------------------------------------------- training and testing


def image_size(window: int) -> int:
    """Side of the images for a window."""
    return PATCH_SIZE * WINDOWS * window


def larger_windows(args: argparse.Namespace) -> list[int]:
    """Window for each factor."""
    return [round(factor * args.window) for factor in args.factors]


def batches(scenes: Scenes, size: int, steps: int, seed: int) -> Iterator[Scenes]:
    """Training batches of `size` scenes, drawn at random; they depend only on the seed."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield scenes.select(torch.from_numpy(rng.integers(0, len(scenes.labels), size)))


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW, without weight decay for the parameters that the configs exempt."""
    adamw = dict(type='AdamW', lr=lr, weight_decay=WEIGHT_DECAY)
    return SwinV2OptimWrapperConstructor(dict(optimizer=adamw))(model).optimizer


def train(model: Classifier, args: argparse.Namespace, seed: int) -> float:
    """Train a model; returns its mean loss over the last tenth of the steps."""
    optimizer = make_optimizer(model.train(), args.lr)
    warm_up = max(round(WARM_UP * args.steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (args.steps - step) / max(args.steps - warm_up, 1))
    )
    scenes = make_scenes(args.train_scenes, TRAIN_SCENES)
    losses = []
    for batch in batches(scenes, args.batch_size, args.steps, seed):
        loss = F.cross_entropy(model(render(batch, image_size(args.window))), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses[-max(args.steps // 10, 1) :]))


@torch.no_grad()
def accuracy(model: Classifier, scenes: Scenes, size: int, batch_size: int = 20) -> float:
    """Per cent of scenes with the right label, rendered at a size."""
    model.eval()
    indices = torch.arange(len(scenes.labels)).split(batch_size)
    parts = [scenes.select(index) for index in indices]
    right = sum(int((model(render(part, size)).argmax(1) == part.labels).sum()) for part in parts)
    return 100 * right / len(scenes.labels)


@torch.no_grad()
def amplitudes(model: Classifier, images: Tensor) -> list[float]:
    """Variance of the output of each block, by depth (Figure 2)."""
    variances = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: variances.append(output.var().item()))
        for block in rivals.blocks(model)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return variances


@torch.no_grad()
def bias_spread(model: Classifier) -> float:
    """Standard deviation of the bias over the relative positions of a window, averaged over heads and blocks."""
    return float(torch.cat([attention.cpb_mlp().std(1) for attention in rivals.attentions(model)]).mean())


def run_job(name: str, seed: int, args: argparse.Namespace) -> dict:
    """Train one model and test it with every window.

    Returns:
        'accuracy' for each factor; 'without_bias', the accuracy at the training size without the position bias;
        'amplitudes', 'loss', 'spread', and CPU time in 'seconds'.
    """
    start = time.process_time()
    variant, scenes = VARIANTS[name], make_scenes(args.test_scenes, TEST_SCENES)
    model = build_model(variant, seed, args.window, args.window)
    loss = train(model, args, seed)
    trained_after = time.process_time() - start
    scores = [
        accuracy(enlarge(model, variant, window, args.window), scenes, image_size(window))
        for window in larger_windows(args)
    ]
    size = image_size(args.window)
    result = dict(
        variant=name,
        seed=seed,
        accuracy=scores,
        amplitudes=amplitudes(model, render(scenes.select(slice(100)), size)),
        loss=loss,
        spread=bias_spread(model),
    )
    rivals.replace_bias(model, rivals.NoBias)
    result['without_bias'] = accuracy(model, scenes, size)
    tested_after = time.process_time() - start
    return result | dict(seconds=dict(training=round(trained_after, 1), testing=round(tested_after - trained_after, 1)))


def _start_worker() -> None:
    torch.set_num_threads(1)
    MMLogger.get_current_instance().setLevel('WARNING')  # without the settings of the optimizer


def run_all(args: argparse.Namespace) -> list[dict]:
    """Run every variant with every seed, each job on one thread, `--processes` jobs at a time."""
    jobs = [(variant, seed, args) for seed in args.seeds for variant in args.variants]
    results = []
    # also for one job at a time: the number of threads is set in the new process
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(args.processes, context, _start_worker) as pool:
        for result in pool.map(run_job, *zip(*jobs, strict=True)):
            print(describe(result), flush=True)
            results.append(result)
    return results


# ---------------------------------------------------------------- results


def describe(result: dict) -> str:
    """One line for one job."""
    scores = ' '.join(f'{score:.1f}' for score in result['accuracy'])
    seconds = result['seconds']
    return (
        f'{result["variant"]} seed {result["seed"]}: accuracy {scores}; bias removed {result["without_bias"]:.1f}; '
        f'loss {result["loss"]:.3f}; spread of the bias {result["spread"]:.2f}; {seconds["training"]:.0f} s training, '
        f'{seconds["testing"]:.0f} s testing'
    )


def values_of(results: list[dict], variant: str, key: str) -> np.ndarray:
    """A value of each seed of a variant: (seeds, ...)."""
    return np.array([result[key] for result in results if result['variant'] == variant])


def spread_over_seeds(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over seeds: (seeds, ...) -> (...); zero for a single seed."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def columns(args: argparse.Namespace) -> list[str]:
    """Headings as in Table 1: window, image size."""
    return [f'W{window}, I{image_size(window)}' for window in larger_windows(args)]


def table(title: str, heads: list[str], results: list[dict], keys: list[str], digits: int) -> list[str]:
    """Lines of a Markdown table with mean and standard deviation of each variant."""
    lines = [f'| {title} | ' + ' | '.join(heads) + ' |', '|---' * (len(heads) + 1) + '|']
    for variant in dict.fromkeys(result['variant'] for result in results):
        values = np.column_stack([values_of(results, variant, key) for key in keys])
        pairs = zip(values.mean(0), spread_over_seeds(values), strict=True)
        cells = [f'{mean:.{digits}f} ± {deviation:.{digits}f}' for mean, deviation in pairs]
        lines.append(f'| {VARIANTS[variant].label} | ' + ' | '.join(cells) + ' |')
    return lines


def markdown(results: list[dict], args: argparse.Namespace) -> str:
    """Two tables: accuracy at each size and without the bias; variance of each block's output."""
    heads = [*columns(args), f'bias removed, W{args.window}']
    depths = [f'block {i + 1}' for i in range(sum(ARCH['depths']))]
    return '\n'.join(
        [
            *table('accuracy, %', heads, results, ['accuracy', 'without_bias'], 1),
            '',
            *table('variance', depths, results, ['amplitudes'], 2),
        ]
    )


def draw(results: list[dict], args: argparse.Namespace) -> Figure:
    """Plot the accuracy of each variant over the sizes, with a dot for each seed."""
    figure = Figure(figsize=(7.2, 4.6), layout='constrained')  # not pyplot, which needs a display
    axes = figure.subplots()
    for i, variant in enumerate(args.variants):
        scores = values_of(results, variant, 'accuracy')
        x = np.arange(len(args.factors)) + 0.06 * (i - (len(args.variants) - 1) / 2)  # offset, to avoid overlap
        (line,) = axes.plot(x, scores.mean(0), label=VARIANTS[variant].label)
        axes.plot(np.broadcast_to(x, scores.shape).ravel(), scores.ravel(), '.', color=line.get_color())
    axes.axhline(100 / DIRECTIONS, color='grey', linestyle=':', label='chance')
    axes.set_xticks(range(len(args.factors)), columns(args))
    axes.set_xlabel('window and image side at test time; training was at the first')
    axes.set_ylabel('accuracy, %')
    axes.set_title(f'Larger windows without fine-tuning, lines: means, dots: {len(args.seeds)} seeds', fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=3, fontsize=8)
    return figure


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and reject windows that give positions away or do not scale to whole numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, default: object, text: str, **kwargs: object) -> None:
        parser.add_argument(name, default=default, help=f'{text} (default: %(default)s)', **kwargs)

    add('--out', Path('ablations.json'), 'JSON file for the results', type=Path)
    add('--plot', Path('ablations.png'), 'file for the plot', type=Path)
    add('--variants', list(VARIANTS), 'models', nargs='+', choices=list(VARIANTS))
    add('--seeds', [0, 1, 2], 'seeds of weights and batches', nargs='+', type=int)
    add('--factors', [1.0, 1.5, 2.0, 3.0], 'test sizes relative to the training size', nargs='+', type=float)
    add('--window', 4, 'training window, in tokens; the images have eight times as many pixels', type=int)
    add('--steps', 500, 'training steps', type=int)
    add('--batch-size', 64, 'images per training step', type=int)
    add('--lr', 2e-3, 'learning rate after warm-up', type=float)
    add('--train-scenes', 20000, 'scenes to train on', type=int)
    add('--test-scenes', 1000, 'scenes to test on', type=int)
    add('--processes', 1, 'parallel jobs, each on one thread', type=int)
    args = parser.parse_args(argv)
    if args.window % 4:
        # tokens of a merged 2x2 cell would lie in different windows, which depends on their place
        parser.error(f'--window must be a multiple of 4, so that shifted windows do not cut 2x2 cells: {args.window}')
    if any(factor < 1 or factor * args.window % 1 for factor in args.factors):
        parser.error(f'--factors must be at least 1 and give whole windows, got {args.factors}')
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
