"""Pre-trains a nano Swin Transformer V2 by SimMIM and fine-tunes it for classification, without a GPU.

    python tools/demo_cls.py

Runs the same tools as a real training: pre-trains configs/ssl/simmim_swinv2_demo.py on 4,000 handwritten digits without
their labels, fine-tunes configs/cls/swinv2_demo.py on 200 labelled ones, from the pre-trained weights and from scratch,
and tests both checkpoints on 1,000 others, with the window and image size of the training and with twice that. Prints
the four accuracies, and draws reconstructions of masked digits and predictions. Fails if a step fails.
"""

import argparse
import json
import pickle
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import load_checkpoint, set_random_seed
from torch import Tensor

import swinv2_mm  # noqa: F401  before any toolbox: it applies workarounds that the toolboxes' imports need
from demo import ROOT, DemoError, Steps, checkpoint_of, join, minutes, newest, run, write
from swinv2_mm.cli import launch

DATA = 'data/digits'
PRETRAINING = 'configs/ssl/simmim_swinv2_demo.py'
FINETUNING = 'configs/cls/swinv2_demo.py'
TESTS = {'window 4, 32 x 32': FINETUNING, 'window 8, 64 x 64': 'configs/cls/swinv2_demo_w8.py'}
STARTS = ('pre-trained', 'from scratch')
NUM_PICTURES = 24
SCALE = 3  # of the pictures


def draw_reconstructions(data: Path, checkpoint: Path, path: Path) -> None:
    """Draws digits that the training has not seen: original, masked, and with the masked patches predicted."""
    cfg = launch.load_config(str(ROOT / PRETRAINING), {})
    init_default_scope(cfg.default_scope)
    set_random_seed(0)
    dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, data_root=str(data), data_prefix='val'))
    samples = [dataset[i] for i in spread(len(dataset))]
    model = MODELS.build(cfg.model)
    load_checkpoint(model, str(checkpoint), map_location='cpu')
    inputs = torch.stack([sample['inputs'] for sample in samples])
    x = model.data_preprocessor(dict(inputs=inputs))['inputs']
    patches = torch.stack([sample['data_samples'].mask for sample in samples])
    with torch.no_grad():
        prediction = model.eval().neck(model.backbone(x, patches)[0])
    side = x.shape[-1] // patches.shape[-1]
    mask = patches.repeat_interleave(side, 1).repeat_interleave(side, 2).unsqueeze(1)

    def images(values: Tensor) -> np.ndarray:
        values = values * model.data_preprocessor.std + model.data_preprocessor.mean
        return values.permute(0, 2, 3, 1).clamp(0, 255).round().byte().numpy()

    columns = [images(x), images(x * (1 - mask)), images(x * (1 - mask) + prediction * mask)]
    join([enlarge(np.hstack(row)) for row in zip(*columns, strict=True)], path, columns=3)


def spread(count: int) -> range:
    """Indices of the images to draw: they come in the order of their classes."""
    return range(0, count, count // NUM_PICTURES)[:NUM_PICTURES]


def enlarge(image: np.ndarray) -> np.ndarray:
    """The image with each pixel as a square."""
    return cv2.resize(image, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_NEAREST)


def draw_predictions(dump: Path, path: Path) -> None:
    """Draws digits with the predicted class; a wrong one is red, with the true class behind it."""
    predictions = pickle.loads(dump.read_bytes())
    pictures = []
    for prediction in (predictions[i] for i in spread(len(predictions))):
        predicted, true = int(prediction['pred_label']), int(prediction['gt_label'])
        picture = enlarge(cv2.imread(prediction['img_path']))
        heading = np.full((28, picture.shape[1], 3), 255, np.uint8)
        text, red = (str(predicted), 0) if predicted == true else (f'{predicted}, not {true}', 220)
        write(heading, text, (4, 20), (0, 0, red))
        pictures.append(np.vstack([heading, picture]))
    join(pictures, path, columns=8)


def start_from(checkpoint: Path) -> list[str]:
    """Options of a training that starts from pre-trained weights of the backbone."""
    return [f'model.backbone.init_cfg.{key}' for key in ('type=Pretrained', f'checkpoint={checkpoint}')]


def folder(work_dir: Path, step: str, start: str, test: int | None = None) -> Path:
    """Work folder of a step for one of `STARTS`, and for one of `TESTS`."""
    parts = [step, start.replace(' ', '_')] if test is None else [step, start.replace(' ', '_'), str(test)]
    return work_dir / '_'.join(parts)


def accuracy(test_dir: Path) -> float:
    """Top-1 accuracy in per cent, from mmengine's log of a test."""
    return json.loads(newest(test_dir, '*/[0-9]*.json').read_text())['accuracy/top1']


def print_table(work_dir: Path) -> None:
    """Prints the accuracy of each start in each test."""
    width = max(map(len, TESTS))
    print('top-1 in %'.ljust(width), *STARTS, sep='  ')
    for number, test in enumerate(TESTS):
        cells = [f'{accuracy(folder(work_dir, "test", start, number)):{len(start)}.1f}' for start in STARTS]
        print(test.ljust(width), *cells, sep='  ')


def demo(work_dir: Path, processes: int) -> None:
    """Runs all steps."""
    pretrain_dir = work_dir / 'pretrain'

    def make_data() -> None:
        run(sys.executable, 'tools/misc/make_digits.py', DATA)

    def pretrain() -> None:
        run('tools/dist_train.sh', PRETRAINING, processes, '--work-dir', pretrain_dir)

    def finetune(start: str) -> None:
        weights = ['--cfg-options', *start_from(checkpoint_of(pretrain_dir))] if start == STARTS[0] else []
        run('tools/dist_train.sh', FINETUNING, processes, '--work-dir', folder(work_dir, 'train', start), *weights)

    def test() -> None:
        for start in STARTS:
            for number, config in enumerate(TESTS.values()):
                test_dir = folder(work_dir, 'test', start, number)
                dump = ['--work-dir', test_dir, '--dump', test_dir / 'predictions.pkl']
                run('tools/dist_test.sh', config, checkpoint_of(folder(work_dir, 'train', start)), processes, *dump)

    steps = {'make the data set': (10, make_data), 'pre-train': (130, pretrain)}
    steps |= {f'fine-tune, {start}': (60, partial(finetune, start)) for start in STARTS}
    steps['test'] = (80, test)
    timing = Steps('SimMIM and classification', {title: seconds for title, (seconds, _) in steps.items()})
    timing.announce()
    for title, (_, action) in steps.items():
        timing.begin(title)
        action()
    files = {'reconstructions': work_dir / 'reconstructions.png', 'predictions': work_dir / 'predictions.png'}
    draw_reconstructions(ROOT / DATA, checkpoint_of(pretrain_dir), files['reconstructions'])
    draw_predictions(folder(work_dir, 'test', STARTS[0], 1) / 'predictions.pkl', files['predictions'])
    print()
    print_table(work_dir)
    for title, path in files.items():
        print(f'{title}: {path}')
    print(f'Done in {minutes(time.monotonic() - timing.start)}.')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'demo_cls', help='default: %(default)s')
    parser.add_argument('--processes', type=int, default=2, help='default: %(default)s, one for each core')
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f'--processes is {args.processes}, give at least 1')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo. Returns the exit status."""
    args = parse_args(argv)
    try:
        demo(args.work_dir.resolve(), args.processes)
    except DemoError as error:
        print(f'\nThe demo stopped: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
