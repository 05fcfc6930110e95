"""A video dataset that can skip unreadable files, and five-crop testing. This module imports mmaction."""

import logging
from numbers import Integral

import numpy as np
from decord import DECORDError
from mmaction.datasets import VideoDataset as MMActionVideoDataset
from mmcv.transforms import BaseTransform
from mmengine.logging import print_log

from ..arguments import Positive, check_arguments
from ..registry import TRANSFORMS

# raised by decord and the file system for files that are missing, truncated or no videos
UNREADABLE = (DECORDError, OSError, RuntimeError)


@check_arguments()
class VideoDataset(MMActionVideoDataset):
    """mmaction's VideoDataset with errors that name the file, and the option to skip unreadable files in training.

    It is not registered, so that nothing else imports mmaction; a config gives its full path:

        dataset=dict(type='swinv2_mm.datasets.video.VideoDataset', skip_unreadable=True, ...)

    Args:
        skip_unreadable: Whether training replaces an unreadable video by a random other one and logs it. Testing raises
            an error in any case, because it must not leave out a video.
        **kwargs: Arguments of `mmaction.datasets.VideoDataset`.
    """

    def __init__(self, *args, skip_unreadable: bool = False, **kwargs) -> None:
        self.skip_unreadable = skip_unreadable
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Read the annotation file.

        Raises:
            ValueError: A line has another format.
        """
        try:
            return super().load_data_list()
        except ValueError as error:
            raise ValueError(
                f'{self.ann_file}: a line must be a path and a class index, separated by {self.delimiter!r} '
                f'({error}); for paths with spaces choose another `delimiter`'
            ) from error

    def prepare_data(self, idx: int) -> dict | None:
        """Run the pipeline on a video. None makes mmengine take another one.

        Raises:
            RuntimeError: The video cannot be read, and must not be skipped.
        """
        try:
            return super().prepare_data(idx)
        except UNREADABLE as error:
            reason = next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__)
            message = f'{self.get_data_info(idx)["filename"]} cannot be read as a video ({reason})'
            if self.skip_unreadable and not self.test_mode:
                # as an error, because mmengine suppresses warnings of all processes but the first
                print_log(f'Skipped: {message}', logger='current', level=logging.ERROR)
                return None
            hint = f'replace it, or remove it from {self.ann_file}'
            if not self.test_mode:
                hint += ', or skip such files: train_dataloader.dataset.skip_unreadable=True'
            raise RuntimeError(f'{message}: {hint}') from error


@TRANSFORMS.register_module()
@check_arguments()
class FiveCrop(BaseTransform):
    """Crop all frames of a clip to their four corners and their centre, in this order: five views of each clip.

    mmaction has only ThreeCrop and TenCrop. Sets the same keys as these: `imgs`, `img_shape` and `crop_bbox`. If the
    shorter side of the frames equals that of the crop, only three of the five views differ.

    Args:
        crop_size: One number or (width, height), in pixels, as for mmaction's crops.

    Raises:
        ValueError: The frames are smaller than the crop.
    """

    def __init__(self, crop_size: Positive | tuple[Positive, Positive]) -> None:
        self.crop_size = (crop_size, crop_size) if isinstance(crop_size, Integral) else tuple(crop_size)

    def transform(self, results: dict) -> dict:
        """Crop the frames (H, W, C) of `imgs`."""
        frames = results['imgs']
        height, width = frames[0].shape[:2]
        w, h = self.crop_size
        right, bottom = width - w, height - h
        if right < 0 or bottom < 0:
            raise ValueError(
                f'FiveCrop: frames of {width}x{height} are smaller than the crop of {w}x{h}; resize them before, to at '
                'least its size'
            )
        corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)]
        results['imgs'] = [frame[y : y + h, x : x + w] for x, y in corners for frame in frames]
        results['crop_bbox'] = np.array([(x, y, x + w, y + h) for x, y in corners for _ in frames])
        results['img_shape'] = (h, w)
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(crop_size={self.crop_size})'
