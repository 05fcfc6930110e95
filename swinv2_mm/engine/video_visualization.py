"""Visualization of video recognition. This module imports mmaction."""

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
    """Draw the frames of a video's first view with the true and the predicted class.

    mmaction's own hook fails: it passes an unknown argument `show` to its visualizer and takes the views of 3D
    recognizers for frames, and the visualizer reads labels under names that mmaction's samples no longer have. This
    class is not registered, so that nothing else imports mmaction; a config gives its full path:

        default_hooks=dict(visualization=dict(type='swinv2_mm.engine.video_visualization.VideoVisualizationHook'))

    Images are written to `<out_dir>/<video>_<step>/frames_<step>/<frame>.png`. <video> is the file name if the
    pipeline's PackActionInputs has 'filename' among its `meta_keys`, otherwise the index in the dataset.

    Args:
        enable: Whether to draw.
        interval: Draw every n-th sample of a process.
        show: Whether to show the frames one after the other in a window.
        out_dir: Folder for the images; None for the folder of the visualizer.
        **kwargs: Arguments of `mmaction.visualization.ActionVisualizer.add_datasample`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.draw_args['show_frames'] = self.draw_args.pop('show')
        self._seen = 0

    def before_val_epoch(self, runner: Runner) -> None:
        """Reset the sample counter."""
        self._seen = 0

    def before_test_epoch(self, runner: Runner) -> None:
        """Reset the sample counter."""
        self._seen = 0

    def _draw_samples(
        self, batch_idx: int, data_batch: dict, data_samples: Sequence[ActionDataSample], step: int = 0
    ) -> None:
        for video, sample in zip(data_batch['inputs'], data_samples, strict=True):
            if self.enable and self._seen % self.interval == 0:
                self._draw(video, sample, step)
            self._seen += 1

    def _draw(self, video: Tensor, sample: ActionDataSample, step: int) -> None:
        number = self._seen * get_world_size() + get_rank()  # samples are distributed round-robin
        path = sample.get('filename') or sample.get('frame_dir') or str(number)
        name = path.replace('\\', '/').rstrip('/').split('/')[-1]
        destination = {}
        if self.out_dir is not None:
            destination['out_path'] = self.file_client.join_path(self.out_dir, f'{name}_{step}')
        self._visualizer.add_datasample(
            name, first_view(video).numpy(), labelled(sample), step=step, **self.draw_args, **destination
        )


def first_view(video: Tensor) -> Tensor:
    """Frames (T, H, W, C) of the first view of a video, from the output of mmaction's pipelines.

    Args:
        video: Views (N, C, T, H, W) for 3D recognizers, or frames (T, C, H, W) for 2D recognizers.

    Raises:
        ValueError: It has another number of axes, such as skeleton data.
    """
    if video.dim() == 5:
        return video[0].permute(1, 2, 3, 0)
    if video.dim() == 4:
        return video.permute(0, 2, 3, 1)
    raise ValueError(f'only frames can be drawn, of shape (N, C, T, H, W) or (T, C, H, W), got {tuple(video.shape)}')


def labelled(sample: ActionDataSample) -> ActionDataSample:
    """Copy the labels to the names that the visualizer reads; unknown labels (-1) are left out."""
    drawn = ActionDataSample()
    if 'gt_label' in sample and (sample.gt_label >= 0).all():
        drawn.gt_label = drawn.gt_labels = sample.gt_label
    if 'pred_label' in sample:
        drawn.pred_labels = LabelData(item=sample.pred_label, score=sample.pred_score)
    return drawn
