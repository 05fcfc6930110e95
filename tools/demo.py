"""Trains HTC++ or UperNet on a nano Swin Transformer V2 from scratch, without a GPU, and shows what it has learnt.

    python tools/demo.py
    python tools/demo.py --task seg

Runs the tools that a real training uses, one after the other: makes a small data set, trains
configs/det/htc_swinv2_demo.py or configs/seg/upernet_swinv2_demo.py, evaluates it, and draws predictions beside the
ground truth. Fails if a step fails or if the result is too poor.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
DATA = 'data/shapes_coco'  # where the configs look
NUM_PICTURES = 8  # of those that the toolbox draws, ground truth and prediction side by side, on the contact sheet


@dataclass(frozen=True)
class Task:
    """What differs between the demos.

    Attributes:
        title: What is trained.
        config: Its config.
        metrics: Title of each figure in what mmengine logs after a test.
        full_score: The best value of these.
        least: Smallest share of it that is a success.
        drawings: Where the toolbox puts its pictures, below the folder of --show-dir.
        loss_parts: What the names of the parts of the loss contain; a cascade's stages have several of each.
        seconds: What training and testing take on two idle cores.
    """

    title: str
    config: str
    metrics: dict[str, str]
    full_score: float
    least: float
    drawings: str
    loss_parts: dict[str, str]
    seconds: tuple[int, int]


TASKS = dict(
    det=Task(
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
        title='UperNet',
        config='configs/seg/upernet_swinv2_demo.py',
        metrics={'mIoU': 'mIoU', 'aAcc': 'aAcc'},
        full_score=100,
        least=0.6,
        drawings='vis_data/vis_image',
        loss_parts={'decode head': 'decode.loss', 'auxiliary head': 'aux.loss'},
        seconds=(200, 20),
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


def contact_sheet(pictures: list[Path], path: Path, columns: int = 2) -> None:
    """Puts pictures of equal size, each ground truth and prediction side by side, on one sheet with a heading."""
    images = [cv2.imread(str(picture)) for picture in pictures]
    gap = 8
    padded = [cv2.copyMakeBorder(image, 0, gap, 0, gap, cv2.BORDER_CONSTANT, value=(255, 255, 255)) for image in images]
    padded += [np.full_like(padded[0], 255)] * (-len(padded) % columns)
    sheet = np.vstack([np.hstack(padded[i : i + columns]) for i in range(0, len(padded), columns)])
    heading = np.full((32, sheet.shape[1], 3), 255, np.uint8)
    width = padded[0].shape[1]
    for column in range(columns):
        for half, text in enumerate(('ground truth', 'prediction')):
            position = (column * width + half * (width - gap) // 2 + 4, 22)
            cv2.putText(heading, text, position, cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.imwrite(str(path), np.vstack([heading, sheet]))


def show_result(task: Task, work_dir: Path, train_dir: Path, test_dir: Path) -> bool:
    """Draws the summaries, prints the metrics and where everything is. Returns whether the result is good enough."""
    metrics_file = newest(test_dir, '*/[0-9]*.json')
    pictures = test_dir / 'pictures' / task.drawings
    files = {
        'predictions': work_dir / 'predictions.png',
        'loss curve': work_dir / 'loss.png',
        'more pictures': pictures,
        'checkpoint': checkpoint_of(train_dir),
    }
    contact_sheet(sorted(pictures.iterdir())[:NUM_PICTURES], files['predictions'])
    plot_loss(read_scalars(newest(train_dir, '*/vis_data/scalars.json')), task, files['loss curve'])
    metrics = json.loads(metrics_file.read_text())
    print()
    for title, key in task.metrics.items():
        print(f'{title:<8} {metrics[key] / task.full_score:.3f}')
    for title, path in files.items():
        print(f'{title}: {path}')
    return all(metrics[key] / task.full_score >= task.least for key in task.metrics.values())


def demo(task: Task, work_dir: Path, processes: int) -> bool:
    """Runs all steps. Returns whether the result is good enough."""
    train_dir, test_dir = work_dir / 'train', work_dir / 'test'

    def make_data() -> None:
        run(sys.executable, 'tools/misc/make_shapes_coco.py', DATA)

    def train() -> None:
        run('tools/dist_train.sh', task.config, processes, '--work-dir', train_dir)

    def test() -> None:
        run(
            'tools/dist_test.sh',
            task.config,
            checkpoint_of(train_dir),
            processes,
            '--work-dir',
            test_dir,
            '--show-dir',
            test_dir / 'pictures',
        )

    training, testing = task.seconds
    steps = {'make the data set': (15, make_data), 'train': (training, train), 'evaluate and draw': (testing, test)}
    timing = Steps(task.title, {title: seconds for title, (seconds, _) in steps.items()})
    timing.announce()
    for title, (_, action) in steps.items():
        timing.begin(title)
        action()
    good = show_result(task, work_dir, train_dir, test_dir)
    print(f'Done in {minutes(time.monotonic() - timing.start)}.')
    return good


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', choices=TASKS, default='det', help='default: %(default)s')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/demo, work_dirs/demo_seg')
    parser.add_argument('--processes', type=int, default=2, help='default: %(default)s, one for each core')
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f'--processes is {args.processes}, give at least 1')
    return args


def main() -> int:
    """Returns the exit status."""
    args = parse_args()
    task = TASKS[args.task]
    work_dir = args.work_dir or ROOT / 'work_dirs' / ('demo' if args.task == 'det' else f'demo_{args.task}')
    try:
        good = demo(task, work_dir.resolve(), args.processes)
    except DemoError as error:
        print(f'\nThe demo stopped: {error}', file=sys.stderr)
        return 1
    if not good:
        print(f'The result is too poor: at least {task.least} was expected of each.', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
