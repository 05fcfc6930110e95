"""For video: a data set that can do without broken files, and the crop into corners and centre; extends mmaction."""

import logging
from numbers import Integral

import numpy as np
from decord import DECORDError
from mmaction.datasets import VideoDataset as MMActionVideoDataset
from mmcv.transforms import BaseTransform
from mmengine.logging import print_log

from ..arguments import Positive, check_arguments
from ..registry import TRANSFORMS

# what decord and the file system raise for files that are missing, truncated or no videos
UNREADABLE = (DECORDError, OSError, RuntimeError)


@check_arguments()
class VideoDataset(MMActionVideoDataset):
    """mmaction's VideoDataset, with errors that name the file, and the choice of training without it.

    Named by its path, so that nothing imports mmaction for it:

        dataset=dict(type='swinv2_mm.datasets.video.VideoDataset', skip_unreadable=True, ...)

    Args:
        skip_unreadable: Whether a training takes a random other video in place of one that cannot be read, and says so
            in the log. A test must not leave any out, so it stops all the same.
        **kwargs: Arguments of `mmaction.datasets.VideoDataset`.
    """

    def __init__(self, *args, skip_unreadable: bool = False, **kwargs) -> None:
        self.skip_unreadable = skip_unreadable
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Read the list of videos.

        Raises:
            ValueError: A line has another form.
        """
        try:
            return super().load_data_list()
        except ValueError as error:
            raise ValueError(
                f'{self.ann_file}: a line must be a path and the number of a class, with {self.delimiter!r} between '
                f'them ({error}); for paths with blanks choose another `delimiter`'
            ) from error

    def prepare_data(self, idx: int) -> dict | None:
        """Return the clip of a video, or None, for which mmengine takes another one.

        Raises:
            RuntimeError: The video cannot be read, and is not to be skipped.
        """
        try:
            return super().prepare_data(idx)
        except UNREADABLE as error:
            reason = next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__)
            message = f'{self.get_data_info(idx)["filename"]} cannot be read as a video ({reason})'
            if self.skip_unreadable and not self.test_mode:
                # an error, because mmengine keeps warnings of all processes but the first to itself
                print_log(f'Skipped: {message}', logger='current', level=logging.ERROR)
                return None
            way_out = 'replace it, or take it off the list'
            if not self.test_mode:
                way_out += ', or train without such files: train_dataloader.dataset.skip_unreadable=True'
            raise RuntimeError(f'{message}; {self.ann_file} names it: {way_out}') from error


@TRANSFORMS.register_module()
@check_arguments()
class FiveCrop(BaseTransform):
    """Crop all frames of a clip to their four corners and their centre, in this order: five views of each clip.

    mmaction has ThreeCrop and TenCrop alone. Takes and gives the keys that these do, `imgs`, `img_shape` and
    `crop_bbox`. Frames whose shorter side is the crop's have three different views among the five.

    Args:
        crop_size: Pixels, one number or (width, height), as for mmaction's crops.

    Raises:
        ValueError: The frames are smaller.
    """

    def __init__(self, crop_size: Positive | tuple[Positive, Positive]) -> None:
        self.crop_size = (crop_size, crop_size) if isinstance(crop_size, Integral) else tuple(crop_size)

    def transform(self, results: dict) -> dict:
        """Crop `imgs`, frames of (H, W, C)."""
        frames = results['imgs']
        height, width = frames[0].shape[:2]
        w, h = self.crop_size
        right, bottom = width - w, height - h
        if right < 0 or bottom < 0:
            raise ValueError(
                f'FiveCrop: frames of {width}x{height} are smaller than the crop of {w}x{h}; resize them to a shorter '
                'side of at least its size before'
            )
        corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)]
        results['imgs'] = [frame[y : y + h, x : x + w] for x, y in corners for frame in frames]
        results['crop_bbox'] = np.array([(x, y, x + w, y + h) for x, y in corners for _ in frames])
        results['img_shape'] = (h, w)
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(crop_size={self.crop_size})'
