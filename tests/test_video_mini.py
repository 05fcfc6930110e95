"""Real and broken videos. Skipped without the sample data in $SWINV2_MM_DATA."""

import os
import pickle
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from decord import VideoReader
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from nano.video import shrink
from tool_runs import REPOSITORY, call, call_together, check_training, metrics

from swinv2_mm.cli import launch

pytest.importorskip('mmaction')
DATA = Path(os.environ.get('SWINV2_MM_DATA', REPOSITORY.parent / 'shared' / 'data')) / 'video'
CONFIG = str(REPOSITORY / 'configs/video/swinv2_t_k400_224x224x32.py')
GOOD = {'arm_wrestling.mp4': 6, 'flipping_a_pancake.mkv': 129}
BROKEN = ('corrupted.mp4', 'missing.mp4', 'empty.mp4', 'text.mp4', 'half.mp4', 'sound.mp4', 'folder.mp4')
BROKEN_IN_TRAINING = BROKEN[:3]
SKIP = 'train_dataloader.dataset.skip_unreadable=True'
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f'{DATA} does not exist')


def write_broken(folder: Path) -> None:
    """Write the files of BROKEN, except 'missing.mp4'."""
    video = (DATA / 'arm_wrestling.mp4').read_bytes()
    silence = b'RIFF\x2c\1\0\0WAVEfmt \x10\0\0\0\1\0\1\0@\x1f\0\0\x80>\0\0\2\0\x10\0data\x08\1\0\0' + bytes(264)
    (folder / 'corrupted.mp4').symlink_to(DATA / 'corrupted.mp4')
    (folder / 'empty.mp4').touch()
    (folder / 'text.mp4').write_text('404 Not Found')
    (folder / 'half.mp4').write_bytes(video[: len(video) // 2])  # without its index, which is at the end
    (folder / 'sound.mp4').write_bytes(silence)  # a WAV file
    (folder / 'folder.mp4').mkdir()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A data set in the layout of Kinetics-400 with both classes in each split, and unlisted broken files."""
    folder = tmp_path_factory.mktemp('kinetics400')
    for split in ('train', 'val'):
        videos = folder / f'videos_{split}'
        videos.mkdir()
        for name in GOOD:
            (videos / name).symlink_to(DATA / name)
        write_broken(videos)
        write_list(folder / f'kinetics400_{split}_list_videos.txt', GOOD)
    return folder


def write_list(path: Path, names) -> Path:
    """Write a list of videos; broken ones are in class 0."""
    path.write_text(''.join(f'{name} {GOOD.get(name, 0)}\n' for name in names))
    return path


def build_dataset(data: Path, split: str, names=GOOD, **others):
    """The data set of the config for 'train', 'val' or 'test', with a list of these videos."""
    from mmaction.registry import DATASETS

    cfg = launch.load_config(CONFIG, dict(data_root=str(data)))[f'{split}_dataloader'].dataset
    cfg.update(ann_file=str(write_list(data / f'{split}_of_a_test.txt', names)), **others)
    with DefaultScope.overwrite_default_scope('mmaction'):
        return DATASETS.build(cfg)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize(('split', 'views'), [('train', 1), ('val', 1), ('test', 12)])
def test_videos_are_decoded_as_configured(data, split, views):
    for sample, label in zip(build_dataset(data, split), GOOD.values(), strict=True):
        assert sample['inputs'].shape == (views, 3, 32, 224, 224)
        assert sample['inputs'].dtype == torch.uint8
        assert sample['data_samples'].gt_label.tolist() == [label]
        assert sample['inputs'].float().std((2, 3, 4)).min() > 10


def test_views_of_a_test_are_four_clips_of_three_crops(data):
    """Compared with views by hand: four clips of 63 frames from start to end, each at the left, middle and right."""
    for name, sample in zip(GOOD, build_dataset(data, 'test'), strict=True):
        video = VideoReader(str(DATA / name))
        height, width = video[0].shape[:2]
        scaled = int(width * 224 / height + 0.5)
        starts = [round(i * (len(video) - 63) / 3) for i in range(4)]
        middle = (scaled - 224) // 2
        crops = [[], [], []]
        for start in starts:
            frames = video.get_batch(range(start, start + 63, 2)).asnumpy()
            frames = [cv2.resize(frame, (scaled, 224), interpolation=cv2.INTER_LINEAR) for frame in frames]
            for crop, left in zip(crops, (0, middle, 2 * middle), strict=True):
                crop.append(np.stack([frame[:, left : left + 224] for frame in frames]))
        by_hand = {clip.tobytes() for crop in crops for clip in crop}
        assert len(by_hand) == 12
        views = sample['inputs'].permute(0, 2, 3, 4, 1).contiguous().numpy()
        assert {view.tobytes() for view in views} == by_hand


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_short_video_is_repeated(data, split):
    """Five frames of different brightness, of which the pipeline takes every second one."""
    path = data / f'videos_{"train" if split == "train" else "val"}/five.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 10, (64, 64))
    for frame in range(5):
        writer.write(np.full((64, 64, 3), 50 * frame, np.uint8))
    writer.release()
    inputs = build_dataset(data, split, ['five.avi'])[0]['inputs'].float()
    frames = (inputs.mean((1, 3, 4)) / 50).round().int()
    assert frames.tolist() == [[2 * i % 5 for i in range(32)]] * len(inputs)


# ---------------------------------------------------------------- broken files


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
@pytest.mark.parametrize('name', BROKEN)
def test_broken_video_is_an_error(data, split, name):
    dataset = build_dataset(data, split, [name])
    folder = 'videos_train' if split == 'train' else 'videos_val'
    with pytest.raises(RuntimeError, match=re.escape(f'{data}/{folder}/{name} cannot be read as a video (')) as error:
        dataset[0]
    assert f'{split}_of_a_test.txt' in str(error.value)
    assert (SKIP in str(error.value)) == (split == 'train')


@pytest.mark.parametrize('name', BROKEN)
def test_training_skips_a_broken_video(data, name):
    dataset = build_dataset(data, 'train', [name, *GOOD], skip_unreadable=True)
    assert dataset[0]['data_samples'].gt_label.item() in GOOD.values()


def test_testing_does_not_skip_a_broken_video(data):
    dataset = build_dataset(data, 'test', ['corrupted.mp4', *GOOD], skip_unreadable=True)
    with pytest.raises(RuntimeError, match='corrupted.mp4 cannot be read as a video'):
        dataset[0]


@pytest.mark.parametrize('name', ['corrupted.mp4', 'missing.mp4'])
def test_error_of_a_data_worker_names_the_video(data, name):
    """Two workers, forked after decord has run in their parent."""
    assert len(VideoReader(str(DATA / 'arm_wrestling.mp4'))) > 0
    loader = dict(
        batch_size=1,
        num_workers=2,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='pseudo_collate'),
    )
    batches = Runner.build_dataloader(dict(loader, dataset=build_dataset(data, 'val')))
    assert [batch['data_samples'][0].gt_label.item() for batch in batches] == list(GOOD.values())
    broken = Runner.build_dataloader(dict(loader, dataset=build_dataset(data, 'val', [*GOOD, name])))
    with pytest.raises(RuntimeError, match=f'{name} cannot be read as a video'):
        list(broken)


# ---------------------------------------------------------------- the tools


@pytest.fixture(scope='module')
def config(data, tmp_path_factory):
    """SwinV2-T's recipe with a nano model, small clips, and two data workers."""
    cfg = shrink(launch.load_config(CONFIG, dict(data_root=str(data))))
    for split in ('train', 'test'):
        cfg[f'{split}_dataloader'].update(batch_size=1, num_workers=2)
    path = tmp_path_factory.mktemp('config') / 'config.py'
    cfg.dump(path)
    return path


@pytest.mark.slow
def test_recognizer_trains_on_real_videos_on_two_processes(data, config, tmp_path):
    """The training skips broken videos, each with a log line of its process."""
    listed = write_list(tmp_path / 'list.txt', [*GOOD, *BROKEN_IN_TRAINING])
    options = ['--no-validate', '--cfg-options', f'train_dataloader.dataset.ann_file={listed}', SKIP]
    output = call_together(tmp_path, 'train.py', config, '--work-dir', 'out', *options)
    check_training(tmp_path / 'out')
    assert 'Epoch(train) [1][3/3]' in output
    for name in BROKEN_IN_TRAINING:
        assert re.search(f'Skipped: .*/videos_train/{name} cannot be read as a video', output)
    assert 'Skipped: ' in max(tmp_path.glob('out/2*/*.log')).read_text()  # those of the first process

    tested = ['--work-dir', 'test', '--out', 'scores.pkl', '--show-dir', 'drawn']
    call_together(tmp_path, 'test.py', config, 'out/epoch_1.pth', *tested)
    videos = pickle.loads((tmp_path / 'scores.pkl').read_bytes())
    assert [video['gt_label'].item() for video in videos] == list(GOOD.values())
    for video in videos:
        assert video['pred_score'].shape == (400,)
        assert (video['pred_score'] >= 0).all()
        assert video['pred_score'].sum().item() == pytest.approx(1, abs=1e-5)
        assert video['pred_label'].item() == video['pred_score'].argmax().item()
    right = [video['pred_label'].item() == video['gt_label'].item() for video in videos]
    assert metrics(tmp_path / 'test')['acc/top1'] == np.mean(right)


def test_training_stops_at_a_broken_video(config, tmp_path):
    """The last line of the error names the file and the option that skips it."""
    listed = write_list(tmp_path / 'list.txt', [*GOOD, 'corrupted.mp4'])
    options = ['--no-validate', '--cfg-options', f'train_dataloader.dataset.ann_file={listed}']
    with pytest.raises(RuntimeError) as stopped:
        call(tmp_path, 'train.py', config, '--work-dir', 'out', *options)
    last = str(stopped.value).strip().splitlines()[-1]
    assert 'videos_train/corrupted.mp4 cannot be read as a video' in last
    assert SKIP in last
