"""Pictures of what a video recognizer predicts; extends mmaction."""

from collections.abc import Sequence

from mmaction.engine.hooks import VisualizationHook
from mmaction.structures import ActionDataSample
from mmaction.visualization import ActionVisualizer
from mmengine.dist import get_rank, get_world_size
from mmengine.runner import Runner
from mmengine.structures import LabelData
from torch import Tensor

from swinv2_mm.arguments import check_arguments


@check_arguments(more=ActionVisualizer.add_datasample)
class VideoVisualizationHook(VisualizationHook):
    """Draw the frames of a video's first view, with its class and the predicted one.

    mmaction's own hook fails: it gives its visualizer an argument `show` that is unknown there, and takes the views of
    3D recognizers for frames. Its visualizer looks for labels under names that mmaction's samples no longer have. Named
    by its path, so that nothing imports mmaction for it:

        default_hooks=dict(visualization=dict(type='swinv2_mm.engine.video_visualization.VideoVisualizationHook'))

    Pictures go to `<out_dir>/<video>_<step>/frames_<step>/<frame>.png`, where the video is its file's name if the
    pipeline's PackActionInputs has 'filename' among its `meta_keys`, else its number in the data set.

    Args:
        enable: Whether to draw at all.
        interval: Draw every so many samples of a process.
        show: Whether to show the frames one after the other in a window.
        out_dir: Folder for the pictures; None for where the visualizer has its own.
        **kwargs: Arguments of `mmaction.visualization.ActionVisualizer.add_datasample`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.draw_args['show_frames'] = self.draw_args.pop('show')
        self._seen = 0

    def before_val_epoch(self, runner: Runner) -> None:
        """Start to count."""
        self._seen = 0

    def before_test_epoch(self, runner: Runner) -> None:
        """Start to count."""
        self._seen = 0

    def _draw_samples(
        self, batch_idx: int, data_batch: dict, data_samples: Sequence[ActionDataSample], step: int = 0
    ) -> None:
        for video, sample in zip(data_batch['inputs'], data_samples, strict=True):
            if self.enable and self._seen % self.interval == 0:
                self._draw(video, sample, step)
            self._seen += 1

    def _draw(self, video: Tensor, sample: ActionDataSample, step: int) -> None:
        number = self._seen * get_world_size() + get_rank()  # processes take samples in turn
        path = sample.get('filename') or sample.get('frame_dir') or str(number)
        name = path.replace('\\', '/').rstrip('/').split('/')[-1]
        place = {}
        if self.out_dir is not None:
            place['out_path'] = self.file_client.join_path(self.out_dir, f'{name}_{step}')
        self._visualizer.add_datasample(
            name, first_view(video).numpy(), labelled(sample), step=step, **self.draw_args, **place
        )


def first_view(video: Tensor) -> Tensor:
    """Frames (T, H, W, C) of a video as mmaction's pipelines leave it.

    Args:
        video: Views (N, C, T, H, W) for 3D recognizers, or frames (T, C, H, W) for 2D ones.

    Raises:
        ValueError: It is neither, as the joints of a skeleton.
    """
    if video.dim() == 5:
        return video[0].permute(1, 2, 3, 0)
    if video.dim() == 4:
        return video.permute(0, 2, 3, 1)
    raise ValueError(f'only frames can be drawn, of shape (N, C, T, H, W) or (T, C, H, W), got {tuple(video.shape)}')


def labelled(sample: ActionDataSample) -> ActionDataSample:
    """A sample with its labels under the names that the visualizer looks for; unknown ones, of -1, are left out."""
    drawn = ActionDataSample()
    if 'gt_label' in sample and (sample.gt_label >= 0).all():
        drawn.gt_label = drawn.gt_labels = sample.gt_label
    if 'pred_label' in sample:
        drawn.pred_labels = LabelData(item=sample.pred_label, score=sample.pred_score)
    return drawn
