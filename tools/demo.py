"""Trains a nano Swin Transformer V2 from scratch, without a GPU, and shows what it has learnt.

    python tools/demo.py               # HTC++ for detection
    python tools/demo.py --task seg    # UperNet for segmentation
    python tools/demo.py --task video  # a recognizer of motion

Runs the tools that a real training uses, one after the other: makes a small data set, trains
configs/det/htc_swinv2_demo.py, configs/seg/upernet_swinv2_demo.py or configs/video/swinv2_demo.py, evaluates it, and
draws predictions beside the ground truth. The recognizer is also tested on the same clips without their motion: with
their frames in a random order, and with one frame all the time. Fails if a step fails, if the result is too poor, or if
it is better than chance where nothing can be seen.
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
NUM_PICTURES = 8  # on the contact sheet
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Task:
    """What differs between the demos.

    Attributes:
        title: What is trained.
        maker: The tool that makes its data.
        data: Where these lie, and where the config looks for them.
        config: Its config.
        metrics: Title of each figure in what mmengine logs after a test.
        full_score: The best value of these.
        least: Smallest share of it that is a success.
        loss_parts: What the names of the parts of the loss contain; a cascade's stages have several of each.
        seconds: What training and each test take on two idle cores.
        drawings: Where the toolbox puts its pictures, below the folder of --show-dir.
        classes: Names of the classes of clips, which are drawn here and not by the toolbox.
        controls: Further validation lists that the same checkpoint is tested on, where nothing can do better than
            chance, by what they are.
        most: Largest share of the best value that is still chance there.
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
        title='Recognizer of motion',
        config='configs/video/swinv2_demo.py',
        metrics={'top-1': 'acc/top1'},
        full_score=1,
        least=0.9,
        loss_parts={},
        seconds=(100, 15),
        classes=('1/8 right', '3/8 right', '3/8 left', '1/8 left'),  # 5/8 and 7/8 right come out as these
        controls={'frames shuffled': 'val_shuffled', 'one frame repeated': 'val_frozen'},
        # One in four, and 4.6 standard deviations of it on 400 clips.
        most=0.35,
    ),
)


class DemoError(RuntimeError):
    """A step of the demo failed."""


class Steps:
    """Announces each step with the time that has passed and what is left on two idle cores."""

    def __init__(self, title: str, seconds: dict[str, int]):
        self.title = title
        self.seconds = seconds
        self.start = time.monotonic()

    def announce(self) -> None:
        """Says what will happen."""
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
    """Runs a tool from the repository's root with its live output."""
    # No GPUs, so that the demo is the same on every machine; one thread per process, as the processes share the cores.
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
    """The newest of the files that a run left: mmengine names its folders by their time."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise DemoError(f'{folder} holds no {pattern}')
    return files[-1]


def checkpoint_of(train_dir: Path) -> Path:
    """The last checkpoint of a training."""
    return Path(newest(train_dir, 'last_checkpoint').read_text().strip())


def read_scalars(path: Path) -> list[dict]:
    """The training records of mmengine's log, which has one JSON object a line."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if 'loss' in record]


def plot_loss(records: list[dict], task: Task, path: Path) -> None:
    """Plots the loss and its parts, each summed over the stages of a cascade."""
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
    """Puts pictures of equal size on one sheet, with a heading over both halves of each column if asked for."""
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
    """The frames of a clip from left to right below its class and its prediction, which is red if it is wrong."""
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
    """Strips of the first validation clips. The predictions are those of mmaction, in the order of the list."""
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
    """Draws the contact sheet. Returns what else there is to look at, by what it is."""
    if task.classes:
        dump = test_dir / 'predictions.pkl'
        join(film_strips(task, pickle.loads(dump.read_bytes())), path)
        return {'all predictions': dump}
    pictures = test_dir / 'pictures' / task.drawings
    # The toolbox puts ground truth and prediction side by side.
    join([cv2.imread(str(p)) for p in sorted(pictures.iterdir())[:NUM_PICTURES]], path, ('ground truth', 'prediction'))
    return {'more pictures': pictures}


def read_metrics(task: Task, test_dir: Path) -> dict[str, float]:
    """The metrics of a test as shares of the best value, by their titles."""
    logged = json.loads(newest(test_dir, '*/[0-9]*.json').read_text())
    return {title: logged[key] / task.full_score for title, key in task.metrics.items()}


def draw_summaries(task: Task, work_dir: Path, train_dir: Path, test_dir: Path) -> dict[str, Path]:
    """Draws predictions and loss curve. Returns all that there is to look at, by what it is."""
    files = {'predictions': work_dir / 'predictions.png', 'loss curve': work_dir / 'loss.png'}
    files |= draw_predictions(task, test_dir, files['predictions'])
    plot_loss(read_scalars(newest(train_dir, '*/vis_data/scalars.json')), task, files['loss curve'])
    return files | {'checkpoint': checkpoint_of(train_dir)}


def judge(task: Task, test_dir: Path, control_dirs: dict[str, Path]) -> list[str]:
    """Prints the metrics of the test and of the controls. Returns what is wrong with them."""
    wrong = []
    metrics = read_metrics(task, test_dir)
    for title, value in metrics.items():
        print(f'{title:<8} {value:.3f}')
    if any(value < task.least for value in metrics.values()):
        wrong.append(f'The result is too poor: at least {task.least} was expected of each.')
    for name, folder in control_dirs.items():
        for title, value in read_metrics(task, folder).items():
            print(f'{title:<8} {value:.3f} with {name}: chance is {1 / len(task.classes)}, at most {task.most} passes')
            if value > task.most:
                wrong.append(f'With {name} the result is better than chance: at most {task.most} was expected.')
    return wrong


def demo(task: Task, work_dir: Path, processes: int) -> list[str]:
    """Runs all steps. Returns what is wrong with the result."""
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
    """Returns the exit status."""
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
