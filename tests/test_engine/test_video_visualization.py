"""VideoVisualizationHook: frames, text and file names."""

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip('mmaction')

from mmaction.structures import ActionDataSample
from mmaction.visualization import ActionVisualizer
from mmengine.registry import DefaultScope

from swinv2_mm.engine.video_visualization import VideoVisualizationHook, first_view


@pytest.fixture(autouse=True)
def _mmaction_scope():
    with DefaultScope.overwrite_default_scope('mmaction'):
        yield


@pytest.fixture
def texts(monkeypatch):
    """Texts drawn on the images."""
    written = []
    draw_texts = ActionVisualizer.draw_texts

    def draw_and_record(self, text, *args, **kwargs):
        written.append(text)
        return draw_texts(self, text, *args, **kwargs)

    monkeypatch.setattr(ActionVisualizer, 'draw_texts', draw_and_record)
    return written


def make_hook(tmp_path, **others):
    """A hook that draws into tmp_path/out; the visualizer is a named instance, as in a Runner."""
    ActionVisualizer.get_instance(str(tmp_path))
    return VideoVisualizationHook(enable=True, out_dir=str(tmp_path / 'out'), **others)


def predicted(label, prediction, score, **meta):
    """A sample with three classes; `score` is that of the predicted class."""
    scores = torch.full((3,), (1 - score) / 2)
    scores[prediction] = score
    sample = ActionDataSample(metainfo=meta)
    return sample.set_gt_label(label).set_pred_label(prediction).set_pred_score(scores)


def test_video_visualization_draws_the_frames_of_the_first_view(tmp_path, texts):
    views = torch.zeros(2, 3, 4, 64, 64, dtype=torch.uint8)
    views[0] = torch.tensor([50, 100, 150, 200], dtype=torch.uint8)[:, None, None]
    make_hook(tmp_path).after_test_iter(None, 0, dict(inputs=[views]), [predicted(2, 1, 0.7)])
    assert texts == [f'Frame {i} of total 4 frames\nGround truth: 2\nPrediction: 1, 0.70' for i in range(4)]
    for i in range(4):
        picture = cv2.imread(str(tmp_path / f'out/0_0/frames_0/{i}.png'))
        assert picture.shape == (64, 64, 3)
        assert (picture[32:] == 50 * (i + 1)).all()
        assert picture[:32].std() > 1


def test_video_visualization_without_a_label(tmp_path, texts):
    frames = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    make_hook(tmp_path).after_test_iter(None, 0, dict(inputs=[frames]), [predicted(-1, 0, 0.5)])
    assert texts == ['Frame 0 of total 1 frames\nPrediction: 0, 0.50']


def test_video_visualization_interval_counts_samples(tmp_path):
    hook = make_hook(tmp_path, interval=2)
    frames = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    hook.before_test_epoch(None)
    for batch, size in enumerate((3, 2)):
        hook.after_test_iter(None, batch, dict(inputs=[frames] * size), [predicted(0, 0, 0.5) for _ in range(size)])
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['0_0', '2_0', '4_0']
    hook.before_test_epoch(None)  # resets the counter
    named = predicted(0, 0, 0.5, filename='videos/a.mp4')
    hook.after_test_iter(None, 0, dict(inputs=[frames]), [named])
    assert (tmp_path / 'out/a.mp4_0').is_dir()


def test_first_view_of_views_and_of_frames():
    views = torch.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)
    assert first_view(views).shape == (4, 5, 6, 3)
    assert np.array_equal(first_view(views)[1, 2, 3], views[0, :, 1, 2, 3])
    assert first_view(views[0]).shape == (3, 5, 6, 4)
    with pytest.raises(ValueError, match='only frames can be drawn'):
        first_view(torch.zeros(2, 3, 17, 2, 1, 1))
