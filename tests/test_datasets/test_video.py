"""FiveCrop against torchvision, and VideoDataset with unreadable files."""

import layouts
import numpy as np
import oracles
import pytest
import torch
from nano.video import write_video

pytest.importorskip('mmaction')
from mmengine.registry import DefaultScope

import swinv2_mm  # noqa: F401
from swinv2_mm.datasets.video import FiveCrop, VideoDataset


def frames(number, height, width):
    generator = np.random.default_rng(0)
    return list(generator.integers(0, 256, (number, height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(('size', 'crop'), [((24, 32), 20), ((24, 32), (20, 16)), ((24, 33), 24), ((20, 20), 20)])
def test_five_crop_equals_torchvision(size, crop):
    """The same four corners and centre; frames are ordered by crop, as mmaction expects views."""
    oracles.find_peers()
    from torchvision.transforms.functional import five_crop

    clip = frames(3, *size)
    results = FiveCrop(crop)(dict(imgs=clip, img_shape=size))
    w, h = (crop, crop) if isinstance(crop, int) else crop
    expected = [
        [view.permute(1, 2, 0).numpy() for view in five_crop(torch.from_numpy(frame).permute(2, 0, 1), (h, w))]
        for frame in clip
    ]
    assert len(results['imgs']) == 15
    for number, image in enumerate(results['imgs']):
        view, time = divmod(number, 3)
        if view < 4:
            assert np.array_equal(image, expected[time][view])
        x, y, right, bottom = results['crop_bbox'][number]
        assert np.array_equal(image, clip[time][y:bottom, x:right])
    # for half a pixel, torchvision rounds to even and mmaction's CenterCrop rounds down
    from mmaction.datasets import CenterCrop

    centre = CenterCrop(crop)(dict(imgs=list(clip), img_shape=size))['imgs']
    for ours, theirs in zip(results['imgs'][12:], centre, strict=True):
        assert np.array_equal(ours, theirs)
    assert results['img_shape'] == (h, w)


def test_five_crop_with_format_shape_gives_clips():
    """5 crops of 2 clips of 3 frames, through mmaction's FormatShape."""
    from mmaction.datasets.transforms import FormatShape

    clip = frames(6, 24, 32)
    results = FiveCrop(16)(dict(imgs=clip, img_shape=(24, 32), num_clips=2, clip_len=3))
    views = FormatShape('NCTHW')(results)['imgs']
    assert views.shape == (10, 3, 3, 16, 16)
    for crop, (x, y) in enumerate([(0, 0), (16, 0), (0, 8), (16, 8), (8, 4)]):
        for part in range(2):
            for time in range(3):
                image = clip[3 * part + time][y : y + 16, x : x + 16]
                assert np.array_equal(views[2 * crop + part, :, time].transpose(1, 2, 0), image)


@pytest.mark.parametrize(('size', 'crop'), [((20, 32), 24), ((32, 20), 24), ((20, 32), (33, 20))])
def test_five_crop_rejects_smaller_frames(size, crop):
    with pytest.raises(ValueError, match=f'frames of {size[1]}x{size[0]} are smaller than the crop of'):
        FiveCrop(crop)(dict(imgs=frames(1, *size), img_shape=size))


# --- unreadable files -------------------------------------------------------------------------------------------------


BROKEN = ['missing', 'empty', 'text', 'cut']


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    """An annotation file with five entries, of which only the last is a readable video."""
    folder = tmp_path_factory.mktemp('videos')
    good = write_video(folder / 'good.avi').read_bytes()
    for name, content in dict(empty=b'', text=b'no video at all', cut=good[:200]).items():
        (folder / f'{name}.avi').write_bytes(content)
    (folder / 'list.txt').write_text(''.join(f'{name}.avi {i}\n' for i, name in enumerate([*BROKEN, 'good'])))
    return folder


def dataset(folder, ann_file='list.txt', **options):
    """The videos as training or test data."""
    pipeline = [
        dict(type='DecordInit'),
        dict(type='SampleFrames', clip_len=4, frame_interval=1, num_clips=1),
        dict(type='DecordDecode'),
        dict(type='FormatShape', input_format='NCTHW'),
        dict(type='PackActionInputs'),
    ]
    with DefaultScope.overwrite_default_scope('mmaction'):
        return VideoDataset(
            ann_file=str(ann_file),
            data_root=str(folder),
            data_prefix=dict(video=''),
            pipeline=pipeline,
            **options,
        )


@pytest.mark.parametrize('name', BROKEN)
def test_video_dataset_names_an_unreadable_file(videos, name):
    with pytest.raises(
        RuntimeError, match=rf'/{name}\.avi cannot be read as a video .*remove it from .*list\.txt'
    ) as error:
        dataset(videos)[BROKEN.index(name)]
    assert 'train_dataloader.dataset.skip_unreadable=True' in str(error.value)


@pytest.mark.parametrize('name', BROKEN)
def test_video_dataset_skips_unreadable_files_in_training(videos, name):
    with layouts.recorded_log() as log:
        item = dataset(videos, skip_unreadable=True)[BROKEN.index(name)]
    assert item['data_samples'].gt_label.tolist() == [4]
    assert item['inputs'].shape == (1, 3, 4, 48, 64)
    assert any(line.startswith('Skipped: ') and f'{name}.avi' in line for line in log)


@pytest.mark.parametrize('name', BROKEN)
def test_video_dataset_skips_nothing_in_testing(videos, name):
    with pytest.raises(RuntimeError, match=rf'/{name}\.avi cannot be read') as error:
        dataset(videos, skip_unreadable=True, test_mode=True)[BROKEN.index(name)]
    assert 'skip_unreadable' not in str(error.value)


@pytest.mark.parametrize('line', ['a video.avi 1', 'video.avi archery', 'video.avi,1,2 x'])
def test_video_dataset_names_an_invalid_annotation_file(videos, line, tmp_path):
    (tmp_path / 'list.txt').write_text(f'{line}\n')
    with pytest.raises(ValueError, match=r"list\.txt: a line must be a path and a class index, separated by ' '"):
        dataset(videos, ann_file=tmp_path / 'list.txt')


def test_video_dataset_does_not_skip_errors_of_the_pipeline(videos):
    data = dataset(videos, skip_unreadable=True)
    data.pipeline.transforms[1].clip_len = 'four'
    with pytest.raises(TypeError):
        data[4]
