"""A check of label maps for semantic segmentation.

A config gives its full path: `swinv2_mm.datasets.labels.CheckLabels`.
"""

import numpy as np
from mmcv.transforms import BaseTransform

from ..arguments import Positive, check_arguments
from ..registry import TRANSFORMS


@TRANSFORMS.register_module()
@check_arguments()
class CheckLabels(BaseTransform):
    """Raise an error for an invalid label map, which names the file.

    Without it, a wrong label trains a wrong model, or stops a GPU kernel of the loss with an error that names no file.
    Placed after `LoadAnnotations` of mmsegmentation:

        dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='swinv2_mm.datasets.labels.CheckLabels', num_classes=150),

    Checks `gt_seg_map` (H, W) against `ori_shape`, and changes nothing. Palette images are fine: mmsegmentation reads
    the index of each pixel, not its colour.

    Args:
        num_classes: Valid labels are 0 to num_classes - 1, and `ignore_index`.
        ignore_index: Label of pixels that the loss ignores.

    Raises:
        ValueError: The label map has colour channels, another size than the image, or an invalid label.
    """

    def __init__(self, num_classes: Positive, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def transform(self, results: dict) -> dict:
        """Check the label map of one image and return `results` unchanged."""
        labels, path = results['gt_seg_map'], results.get('seg_map_path')
        if labels.ndim != 2:
            raise ValueError(
                f'label map {path} has the shape {labels.shape} of a colour image: it must have one index for each '
                'pixel, as a grey or palette PNG'
            )
        if labels.shape != tuple(results['ori_shape']):
            raise ValueError(
                f'label map {path} is of size {labels.shape}, its image of size {tuple(results["ori_shape"])}: '
                'is it the label map of this image?'
            )
        present = np.unique(labels)
        wrong = present[(present >= self.num_classes) & (present != self.ignore_index)]
        if wrong.size:
            shift = ' (after reduce_zero_label: one more in the file)' if results.get('reduce_zero_label') else ''
            raise ValueError(
                f'label map {path} contains {wrong.tolist()}: labels are 0 to {self.num_classes - 1}, or '
                f'{self.ignore_index} for ignored pixels{shift}. Fix the label map or num_classes'
            )
        return results

    def __repr__(self) -> str:
        """Name and arguments."""
        return f'{type(self).__name__}(num_classes={self.num_classes}, ignore_index={self.ignore_index})'
