"""Trains a nano Swin Transformer V2 from scratch, without a GPU, and draws its predictions.

    python tools/demo.py               # HTC++ for detection
    python tools/demo.py --task seg    # UperNet for segmentation
    python tools/demo.py --task video  # motion recognition

Runs the same tools as a real training: makes a small data set, trains configs/det/htc_swinv2_demo.py,
configs/seg/upernet_swinv2_demo.py or configs/video/swinv2_demo.py, evaluates it, and draws predictions next to the
ground truth. The video model is also tested on two controls, the same clips without their motion: with shuffled frames,
and with one frame repeated. Fails if a step fails, if a metric is too low, or if a control is better than chance.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
NUM_PICTURES = 8  # in the overview image
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Task:
    """Settings of one demo.

    Attributes:
        title: Name of the model.
        maker: The tool that makes its data set.
        data: Folder of the data set, also in the config.
        config: Path of the config.
        metrics: Name of each metric -> its key in mmengine's log of a test.
        full_score: Best possible value of the metrics.
        least: Smallest fraction of it that passes.
        loss_parts: Label of each part of the loss -> substring of its keys; each stage of a cascade has such a key.
        seconds: Duration of the training and of a test on two idle cores.
        drawings: Folder of the toolbox's drawings inside that of --show-dir.
        classes: Class names of clips, which this script draws itself; empty if the toolbox draws.
        controls: Description -> validation list of each control, on which no model can do better than chance.
        most: Largest fraction of the best value that passes for chance on a control.
    """

    title: str
    maker: str
    data: str
    config: str
    metrics: dict[str, str]
    full_score: float
    least: float
    loss_parts: dict[str, str]
    seconds: tuple[int, int]
    drawings: str = ''
    classes: tuple[str, ...] = ()
    controls: dict[str, str] = field(default_factory=dict)
    most: float = 1


SHAPES = dict(maker='tools/misc/make_shapes_coco.py', data='data/shapes_coco')
TASKS = dict(
    det=Task(
        **SHAPES,
        title='HTC++',
        config='configs/det/htc_swinv2_demo.py',
        metrics={'box AP': 'coco/bbox_mAP', 'mask AP': 'coco/segm_mAP'},
        full_score=1,
        least=0.4,
        drawings='.',
        loss_parts={
            'proposals': 'loss_rpn',
            'semantic segmentation': 'loss_semantic',
            'classes': '.loss_cls',
            'boxes': '.loss_bbox',
            'masks': '.loss_mask',
        },
        seconds=(210, 30),
    ),
    seg=Task(
        **SHAPES,
        title='UperNet',
        config='configs/seg/upernet_swinv2_demo.py',
        metrics={'mIoU': 'mIoU', 'aAcc': 'aAcc'},
        full_score=100,
        least=0.6,
        drawings='vis_data/vis_image',
        loss_parts={'decode head': 'decode.loss', 'auxiliary head': 'aux.loss'},
        seconds=(200, 20),
    ),
    video=Task(
        maker='tools/misc/make_motion_clips.py',
        data='data/motion_clips',
        title='Motion recognition',
        config='configs/video/swinv2_demo.py',
        metrics={'top-1': 'acc/top1'},
        full_score=1,
        least=0.9,
        loss_parts={},
        seconds=(100, 15),
        classes=('1/8 right', '3/8 right', '3/8 left', '1/8 left'),  # 5/8 and 7/8 right look like these
        controls={'frames shuffled': 'val_shuffled', 'one frame repeated': 'val_frozen'},
        # chance is 1/4; 4.6 standard deviations above it for 400 clips
        most=0.35,
    ),
)


class DemoError(RuntimeError):
    """A step of the demo failed."""


class Steps:
    """Prints a heading for each step, with the elapsed time and an estimate of the remaining time."""

    def __init__(self, title: str, seconds: dict[str, int]):
        self.title = title
        self.seconds = seconds
        self.start = time.monotonic()

    def announce(self) -> None:
        """Prints the list of steps."""
        print(
            f'Demo: {self.title} with a nano Swin Transformer V2, from scratch. '
            f'About {minutes(sum(self.seconds.values()))} on two idle cores:'
        )
        for number, (title, seconds) in enumerate(self.seconds.items(), 1):
            print(f'  {number}. {title} ({minutes(seconds)})')

    def begin(self, title: str) -> None:
        """Prints the heading of a step."""
        titles = list(self.seconds)
        left = sum(self.seconds[t] for t in titles[titles.index(title) :])
        passed = minutes(time.monotonic() - self.start)
        number = f'{titles.index(title) + 1}/{len(titles)}'
        print(f'\n=== {number} {title}: {passed} elapsed, about {minutes(left)} to go ===', flush=True)


def minutes(seconds: float) -> str:
    """Seconds as 'm:ss min'."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d} min'


def run(*command: str | Path) -> None:
    """Runs a tool in the root of the repository and prints its output."""
    # no GPU, so that the demo is the same on every machine; one thread per process, because processes share the cores
    env = dict(
        os.environ,
        PYTHON=sys.executable,
        CUDA_VISIBLE_DEVICES='',
        OMP_NUM_THREADS='1',
        PYTHONUNBUFFERED='1',
        PYTHONWARNINGS='ignore',
    )
    command = [str(part) for part in command]
    print('$', ' '.join(command), flush=True)
    code = subprocess.run(command, cwd=ROOT, env=env, check=False).returncode
    if code:
        raise DemoError(f'this command ended with code {code}: {" ".join(command)}')


def newest(folder: Path, pattern: str) -> Path:
    """The newest matching file of a run: mmengine names its folders by the time of their start."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise DemoError(f'{folder} contains no {pattern}')
    return files[-1]


def checkpoint_of(train_dir: Path) -> Path:
    """The last checkpoint of a training."""
    return Path(newest(train_dir, 'last_checkpoint').read_text().strip())


def read_scalars(path: Path) -> list[dict]:
    """The training records of mmengine's log, which has one JSON object per line."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if 'loss' in record]


def plot_loss(records: list[dict], task: Task, path: Path) -> None:
    """Plots the total loss and its parts, each summed over the stages of a cascade."""
    steps = [record['step'] for record in records]
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    axes.plot(steps, [record['loss'] for record in records], color='black', linewidth=2, label='total')
    for label, part in task.loss_parts.items():
        names = [name for name in records[0] if part in name]
        axes.plot(steps, [sum(record[name] for name in names) for record in records], label=label)
    axes.set(xlabel='step', ylabel='loss', ylim=(0, None), title=f'{task.title} with a nano Swin Transformer V2')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def join(pictures: list[np.ndarray], path: Path, heading: tuple[str, str] | None = None, columns: int = 2) -> None:
    """Joins images of equal size into one, with an optional heading above each half of each column."""
    gap = 8
    padded = [cv2.copyMakeBorder(picture, 0, gap, 0, gap, cv2.BORDER_CONSTANT, value=WHITE) for picture in pictures]
    padded += [np.full_like(padded[0], 255)] * (-len(padded) % columns)
    rows = [np.hstack(padded[i : i + columns]) for i in range(0, len(padded), columns)]
    if heading:
        rows.insert(0, np.full((32, rows[0].shape[1], 3), 255, np.uint8))
        width = padded[0].shape[1]
        for column in range(columns):
            for half, text in enumerate(heading):
                write(rows[0], text, (column * width + half * (width - gap) // 2 + 4, 22))
    cv2.imwrite(str(path), np.vstack(rows))


def write(image: np.ndarray, text: str, position: tuple[int, int], colour: tuple[int, int, int] = (0, 0, 0)) -> None:
    """Writes a line of text on an image."""
    cv2.putText(image, text, position, cv2.FONT_HERSHEY_SIMPLEX, 0.6, colour, 1, cv2.LINE_AA)


def film_strip(path: Path, truth: str, prediction: str) -> np.ndarray:
    """The frames of a clip from left to right, below the true and the predicted class; a wrong prediction is red."""
    frames = []
    video = cv2.VideoCapture(str(path))
    while (frame := video.read()[1]) is not None:
        frames.append(cv2.copyMakeBorder(frame, 0, 0, 0, 2, cv2.BORDER_CONSTANT, value=WHITE))
    if not frames:
        raise DemoError(f'{path} cannot be read as a video')
    strip = np.hstack(frames)
    heading = np.full((28, strip.shape[1], 3), 255, np.uint8)
    write(heading, f'true: {truth}', (4, 20))
    write(heading, f'predicted: {prediction}', (strip.shape[1] // 2, 20), (0, 0, 0 if truth == prediction else 220))
    return np.vstack([heading, strip])


def film_strips(task: Task, predictions: list[dict]) -> list[np.ndarray]:
    """Strips of the first validation clips.

    Args:
        task: The demo.
        predictions: Predictions that mmaction dumped, in the order of the validation list.
    """
    folder = ROOT / task.data / 'val'
    strips = []
    lines = folder.with_suffix('.txt').read_text().splitlines()
    for line, prediction in list(zip(lines, predictions, strict=True))[:NUM_PICTURES]:
        name, label = line.split()
        if int(label) != int(prediction['gt_label']):
            raise DemoError('the predictions are in another order than the clips')
        strips.append(film_strip(folder / name, task.classes[int(label)], task.classes[int(prediction['pred_label'])]))
    return strips


def draw_predictions(task: Task, test_dir: Path, path: Path) -> dict[str, Path]:
    """Draws the overview image. Returns further output files, by their description."""
    if task.classes:
        dump = test_dir / 'predictions.pkl'
        join(film_strips(task, pickle.loads(dump.read_bytes())), path)
        return {'all predictions': dump}
    pictures = test_dir / 'pictures' / task.drawings
    # the toolbox draws ground truth and prediction side by side
    join([cv2.imread(str(p)) for p in sorted(pictures.iterdir())[:NUM_PICTURES]], path, ('ground truth', 'prediction'))
    return {'more pictures': pictures}


def read_metrics(task: Task, test_dir: Path) -> dict[str, float]:
    """The metrics of a test as fractions of the best value, by their names."""
    logged = json.loads(newest(test_dir, '*/[0-9]*.json').read_text())
    return {title: logged[key] / task.full_score for title, key in task.metrics.items()}


def draw_summaries(task: Task, work_dir: Path, train_dir: Path, test_dir: Path) -> dict[str, Path]:
    """Draws predictions and loss curve. Returns all output files, by their description."""
    files = {'predictions': work_dir / 'predictions.png', 'loss curve': work_dir / 'loss.png'}
    files |= draw_predictions(task, test_dir, files['predictions'])
    plot_loss(read_scalars(newest(train_dir, '*/vis_data/scalars.json')), task, files['loss curve'])
    return files | {'checkpoint': checkpoint_of(train_dir)}


def judge(task: Task, test_dir: Path, control_dirs: dict[str, Path]) -> list[str]:
    """Prints the metrics of the test and of the controls. Returns a message for each that does not pass."""
    wrong = []
    metrics = read_metrics(task, test_dir)
    for title, value in metrics.items():
        print(f'{title:<8} {value:.3f}')
    if any(value < task.least for value in metrics.values()):
        wrong.append(f'The result is too low: each metric must be at least {task.least}.')
    for name, folder in control_dirs.items():
        for title, value in read_metrics(task, folder).items():
            print(f'{title:<8} {value:.3f} with {name}: chance is {1 / len(task.classes)}, at most {task.most} passes')
            if value > task.most:
                wrong.append(f'With {name} the result is better than chance: it must be at most {task.most}.')
    return wrong


def demo(task: Task, work_dir: Path, processes: int) -> list[str]:
    """Runs all steps. Returns the messages of `judge`."""
    train_dir, test_dir = work_dir / 'train', work_dir / 'test'
    control_dirs = {name: work_dir / f'test_{split}' for name, split in task.controls.items()}

    def make_data() -> None:
        run(sys.executable, task.maker, task.data)

    def train() -> None:
        run('tools/dist_train.sh', task.config, processes, '--work-dir', train_dir)

    def test(folder: Path, *arguments: str | Path) -> None:
        run('tools/dist_test.sh', task.config, checkpoint_of(train_dir), processes, '--work-dir', folder, *arguments)

    def evaluate() -> None:
        if task.classes:
            test(test_dir, '--dump', test_dir / 'predictions.pkl')
        else:
            test(test_dir, '--show-dir', test_dir / 'pictures')

    def control(name: str) -> None:
        dataset, split = 'test_dataloader.dataset', task.controls[name]
        options = f'{dataset}.ann_file={split}.txt', f'{dataset}.data_prefix.video={split}'
        test(control_dirs[name], '--cfg-options', *options)

    training, testing = task.seconds
    steps = {'make the data set': (15, make_data), 'train': (training, train), 'evaluate and draw': (testing, evaluate)}
    steps |= {f'evaluate with {name}': (testing, partial(control, name)) for name in task.controls}
    timing = Steps(task.title, {title: seconds for title, (seconds, _) in steps.items()})
    timing.announce()
    for title, (_, action) in steps.items():
        timing.begin(title)
        action()
    files = draw_summaries(task, work_dir, train_dir, test_dir)
    print()
    wrong = judge(task, test_dir, control_dirs)
    for title, path in files.items():
        print(f'{title}: {path}')
    print(f'Done in {minutes(time.monotonic() - timing.start)}.')
    return wrong


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', choices=TASKS, default='det', help='default: %(default)s')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/demo, demo_seg or demo_video')
    parser.add_argument('--processes', type=int, default=2, help='default: %(default)s, one for each core')
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f'--processes is {args.processes}, give at least 1')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo. Returns the exit status."""
    args = parse_args(argv)
    task = TASKS[args.task]
    work_dir = args.work_dir or ROOT / 'work_dirs' / ('demo' if args.task == 'det' else f'demo_{args.task}')
    try:
        wrong = demo(task, work_dir.resolve(), args.processes)
    except DemoError as error:
        print(f'\nThe demo stopped: {error}', file=sys.stderr)
        return 1
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
