"""The decoded clips of the video demo, and the checks and drawings of the demo."""

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tool_runs import REPOSITORY, TOOLS, call, check_training, load_tool, metrics, run

from swinv2_mm.cli import launch

decord = pytest.importorskip('decord')
TRAIN, VAL, SIZE = 240, 120, 64
EIGHTHS = {0: 1, 1: 3, 2: 5, 3: 7}  # to the right, from frame to frame, of each class
CONFIG = REPOSITORY / 'configs/video/swinv2_demo.py'
MAKER = 'misc/make_motion_clips.py'


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOLS / MAKER)


def make(tool, out, *more, train=TRAIN, val=VAL, seed=3):
    tool.main([str(out), *map(str, ['--train', train, '--val', val, '--size', SIZE, '--seed', seed, *more])])
    return out


@pytest.fixture(scope='module')
def data(tool, tmp_path_factory):
    return make(tool, tmp_path_factory.mktemp('motion') / 'clips')


def read_list(data, split):
    return [(name, int(label)) for name, label in (line.split() for line in (data / f'{split}.txt').open())]


@functools.cache
def read_clips(data, split):
    """Clips (clips, frames, height, width, 3) and classes. The arrays are cached: do not change them."""
    clips = []
    for name, _ in read_list(data, split):
        video = decord.VideoReader(str(data / split / name))
        clips.append(video.get_batch(range(len(video))).asnumpy())
    return np.stack(clips), np.array([label for _, label in read_list(data, split)])


@functools.cache
def find_shapes(data, split):
    """`find_shape` of all clips: (clips, frames) each."""
    places, rows = zip(*map(find_shape, read_clips(data, split)[0]), strict=True)
    return np.stack(places), np.stack(rows)


def find_shape(frames):
    """Position of the shape in each frame, (eighths of the width, row), from the pixels that change."""
    background = np.median(frames, axis=0)
    mask = np.abs(frames - background).max(axis=-1) > 40
    assert np.all(mask.sum(axis=(1, 2)) >= 10)
    columns = mask.sum(axis=1) @ np.exp(2j * np.pi * (np.arange(SIZE) + 0.5) / SIZE)  # positions wrap around
    rows = mask.sum(axis=2) @ (np.arange(SIZE) + 0.5) / mask.sum(axis=(1, 2))
    return np.angle(columns) / (2 * np.pi) * 8 % 8, rows


def hashes(folder, pattern='*/*.avi'):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob(pattern))}


def frame_set(frames):
    return sorted(frame.tobytes() for frame in frames)


def place_in(frames, frame):
    return [f.tobytes() for f in frames].index(frame.tobytes())


@pytest.mark.parametrize('split', ['train', 'val'])
def test_clips_move_in_steps_of_their_class(data, split):
    clips, labels = read_clips(data, split)
    assert clips.shape == (dict(train=TRAIN, val=VAL)[split], 8, SIZE, SIZE, 3)
    for places, rows, label in zip(*find_shapes(data, split), labels, strict=True):
        assert np.ptp(rows) < 1.5
        visited = (places - places[0]) % 8
        assert sorted(np.rint(visited).astype(int) % 8) == list(range(8))
        steps = np.diff(places) % 8
        assert np.all(np.abs(steps - EIGHTHS[label]) < 0.3), (label, steps)


def test_clips_start_at_random_places(data):
    """If the first frame had the same position in all clips, the second one would reveal the class."""
    labels = read_clips(data, 'train')[1]
    starts = find_shapes(data, 'train')[0][:, 0]
    for label in EIGHTHS:
        assert np.all(np.histogram(starts[labels == label], 4, (0, 8))[0] >= 5)


def test_frames_do_not_depend_on_the_class(tool, data, tmp_path, monkeypatch):
    """With other classes, the same random numbers give the same frames in another order, and the same controls."""
    monkeypatch.setattr(tool, 'STEPS', (7, 5, 1, 3))
    other = make(tool, tmp_path / 'other', train=16, val=16)
    for split in ('train', 'val'):
        for ours, theirs in zip(read_clips(data, split)[0][:16], read_clips(other, split)[0], strict=True):
            assert frame_set(ours) == frame_set(theirs)
            assert not np.array_equal(ours, theirs)
    for control in ('val_shuffled', 'val_frozen'):
        theirs = hashes(other, f'{control}/*.avi')
        assert len(theirs) == 16
        assert theirs.items() <= hashes(data, f'{control}/*.avi').items()


def nearest_neighbour_accuracy(train, train_labels, val, val_labels):
    """Of features of shape (clips, ...), each divided by its standard deviation."""
    train, val = (features.reshape(len(features), -1).astype(float) for features in (train, val))
    scale = train.std(axis=0) + 1e-9
    train, val = train / scale, val / scale
    distances = (train**2).sum(axis=1) - 2 * val @ train.T
    return (train_labels[distances.argmin(axis=1)] == val_labels).mean()


def test_class_depends_only_on_the_order_of_frames(data):
    train, train_labels = read_clips(data, 'train')
    val, val_labels = read_clips(data, 'val')
    small = [clips[:, :, 2::4, 2::4] for clips in (train, val)]

    places = [find_shapes(data, split)[0] for split in ('train', 'val')]

    def sorted_by_place(places, small):
        return np.take_along_axis(small, np.argsort(places, axis=1)[..., None, None, None], axis=1)

    blind = {
        'first frame': [clips[:, 0] for clips in small],
        'last frame': [clips[:, -1] for clips in small],
        'mean of the frames': [clips.mean(axis=1) for clips in small],
        'frames from left to right': [sorted_by_place(*pair) for pair in zip(places, small, strict=True)],
    }
    for name, (known, unknown) in blind.items():
        accuracy = nearest_neighbour_accuracy(known, train_labels, unknown, val_labels)
        assert 0.25 - 0.12 < accuracy < 0.25 + 0.12, name  # three standard deviations
    phases = [np.exp(1j * p * np.pi / 4) for p in places]
    moves = [(t[:, 1:] * t[:, :-1].conj()).mean(axis=1) for t in phases]
    known, unknown = (np.stack([m.real, m.imag], axis=1) for m in moves)
    assert nearest_neighbour_accuracy(known, train_labels, unknown, val_labels) == 1


def test_controls_are_shuffled_and_frozen_validation_clips(data):
    """Frames are bitwise equal: the codec leaves no trace of other frames in them."""
    clips, labels = read_clips(data, 'val')
    shuffled, frozen = (read_clips(data, f'val_{control}') for control in ('shuffled', 'frozen'))
    assert np.array_equal(shuffled[1], labels)
    assert np.array_equal(frozen[1], labels)
    orders, kept = [], []
    for original, mixed, still in zip(clips, shuffled[0], frozen[0], strict=True):
        assert len(set(frame_set(original))) == 8
        assert frame_set(mixed) == frame_set(original)
        orders.append(tuple(place_in(original, frame) for frame in mixed))
        assert len(set(frame_set(still))) == 1
        kept.append(place_in(original, still[0]))
    assert len(set(orders)) > VAL * 0.9
    assert len(set(kept)) == 8


def test_shuffled_clips_do_not_move_like_their_class(data):
    labels = read_clips(data, 'val_shuffled')[1]
    right = [
        np.mean(np.abs(np.diff(places) % 8 - EIGHTHS[label]) < 0.3)
        for places, label in zip(find_shapes(data, 'val_shuffled')[0], labels, strict=True)
    ]
    assert abs(np.mean(right) - 1 / 7) < 0.05  # one of the seven places that are left


@pytest.mark.parametrize(('count', 'shares'), [(8, [2, 2, 2, 2]), (6, [2, 2, 1, 1])])
def test_classes_are_balanced(tool, tmp_path, count, shares):
    out = make(tool, tmp_path / 'clips', train=count, val=count)
    for split in ('train', 'val', 'val_shuffled', 'val_frozen'):
        names, labels = zip(*read_list(out, split), strict=True)
        assert [Counter(labels)[label] for label in EIGHTHS] == shares
        assert sorted(names) == sorted(p.name for p in (out / split).iterdir())


def test_training_and_validation_share_nothing(data):
    frames = [{f.tobytes() for clip in read_clips(data, split)[0] for f in clip} for split in ('train', 'val')]
    assert [len(f) for f in frames] == [8 * TRAIN, 8 * VAL]
    assert not frames[0] & frames[1]


def test_same_arguments_give_same_bytes_and_another_seed_other_clips(tool, data, tmp_path):
    """First as users start it, then in this process with one thread, as on a small machine."""
    again = tmp_path / 'again'
    output = run(tmp_path, MAKER, again, '--train', 8, '--val', 8, '--size', SIZE, '--seed', 3)
    assert f'{again}: clips of 8 frames of 64 x 64 pixels' in output
    first = hashes(again, '**/*.*')
    assert len(first) == 4 * 8 + 5
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        make(tool, again, train=8, val=8)
    finally:
        cv2.setNumThreads(threads)
    assert hashes(again, '**/*.*') == first
    assert hashes(again).items() <= hashes(data).items()  # clips do not depend on their number either
    make(tool, again, train=4, val=4, seed=4)
    replaced = hashes(again)
    assert len(replaced) == 4 * 4
    assert not set(replaced.values()) & set(hashes(data).values())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--train', '3'], '--train is 3, give at least 4'),
        (['--val', '-2'], '--val is -2, give at least 4'),
        (['--size', '16'], '--size is 16, give at least 32'),
        (['--size', '48'], '--size is 48, give a multiple of 32: decord fails on some others'),
        (['--seed', '-1'], '--seed is -1, give at least 0'),
        (['--size', 'big'], "argument --size: invalid int value: 'big'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tool, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as refusal:
        tool.main([str(tmp_path / 'out'), *arguments])
    assert refusal.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f'error: {message}')
    assert not list(tmp_path.iterdir())


def test_other_folders_are_not_overwritten(tool, tmp_path, capsys):
    (tmp_path / 'precious.txt').write_text('mine')
    for out in (tmp_path, tmp_path / 'precious.txt'):
        with pytest.raises(SystemExit):
            tool.main([str(out), '--train', '4', '--val', '4'])
        assert 'delete it or choose another folder' in capsys.readouterr().err
    assert (tmp_path / 'precious.txt').read_text() == 'mine'


# ---------------------------------------------------------------- the demo


def load_config(data):
    return launch.load_config(str(CONFIG), {'data_root': str(data)})


def test_demo_config_reads_clips_unchanged(data):
    pytest.importorskip('mmaction')
    from mmengine.registry import DATASETS, DefaultScope

    cfg = load_config(data)
    clips = {split: read_clips(data, split) for split in ('train', 'val')}
    for loader, split in ((cfg.train_dataloader, 'train'), (cfg.val_dataloader, 'val'), (cfg.test_dataloader, 'val')):
        with DefaultScope.overwrite_default_scope('mmaction'):
            dataset = DATASETS.build(loader.dataset)
        assert len(dataset) == len(clips[split][0])
        for index in range(5):
            sample = dataset[index]
            assert np.array_equal(sample['inputs'][0].permute(1, 2, 3, 0), clips[split][0][index])
            assert sample['data_samples'].gt_label == clips[split][1][index]


def test_demo_config_trains_and_tests_on_the_controls(tool, tmp_path):
    data = make(tool, tmp_path / 'clips', train=16, val=8)
    work_dir = tmp_path / 'work'
    options = ['--cfg-options', f'data_root={data}', 'default_hooks.logger.interval=1']
    call(tmp_path, 'train.py', CONFIG, '--work-dir', work_dir, *options, 'train_cfg.max_epochs=1')
    check_training(work_dir)
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    split = 'val_frozen'
    options += [f'test_dataloader.dataset.ann_file={split}.txt', f'test_dataloader.dataset.data_prefix.video={split}']
    call(tmp_path, 'test.py', CONFIG, checkpoint, '--work-dir', tmp_path / 'test', *options)
    logged = metrics(tmp_path / 'test')
    assert 0 <= logged['acc/top1'] <= 1
    assert 'acc/top5' not in logged  # of four classes


@pytest.fixture(scope='module')
def demo():
    return load_tool(TOOLS / 'demo.py')


def write_metric(folder: Path, value: float) -> Path:
    (folder / '20260101').mkdir(parents=True)
    (folder / '20260101' / '20260101.json').write_text(json.dumps({'acc/top1': value}))
    return folder


@pytest.mark.parametrize(
    ('test', 'shuffled', 'frozen', 'messages'),
    [
        (0.9, 0.35, 0.1, []),
        (0.89, 0.25, 0.25, ['too low']),
        (0.99, 0.36, 0.25, ['frames shuffled']),
        (0.5, 0.4, 0.4, ['too low', 'frames shuffled', 'one frame repeated']),
    ],
)
def test_demo_fails_below_its_bound_and_above_chance(demo, tmp_path, capsys, test, shuffled, frozen, messages):
    task = demo.TASKS['video']
    controls = {
        name: write_metric(tmp_path / name, value)
        for name, value in zip(task.controls, (shuffled, frozen), strict=True)
    }
    wrong = demo.judge(task, write_metric(tmp_path / 'test', test), controls)
    assert len(wrong) == len(messages)
    assert all(part in line for part, line in zip(messages, wrong, strict=True))
    printed = capsys.readouterr().out
    assert all(f'{value:.3f}' in printed for value in (test, shuffled, frozen))


def test_demo_draws_frames_and_marks_errors(demo, data, monkeypatch):
    monkeypatch.setattr(demo, 'ROOT', data.parent)
    task = dataclasses.replace(demo.TASKS['video'], data=data.name)
    classes = [torch.tensor([label]) for _, label in read_list(data, 'val')]
    predictions = [dict(gt_label=label, pred_label=label) for label in classes]
    predictions[0]['pred_label'] = torch.tensor([3])
    strips = demo.film_strips(task, predictions)
    assert len(strips) == 8
    clips = read_clips(data, 'val')[0]
    for index, strip in enumerate(strips):
        heading, frames = strip[:-SIZE], strip[-SIZE:]
        shown = frames.reshape(SIZE, 8, -1, 3)[:, :, :SIZE, ::-1].transpose(1, 0, 2, 3)
        assert np.abs(shown.astype(int) - clips[index]).mean() < 2  # OpenCV's and decord's decoders round differently
        red = (heading[..., 2] > 200) & (heading[..., 0] < 60)
        assert red.any() == (index == 0)
    with pytest.raises(demo.DemoError, match='another order'):
        demo.film_strips(task, predictions[::-1])
