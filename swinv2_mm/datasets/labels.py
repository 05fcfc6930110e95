"""A check of label maps for semantic segmentation.

A config names it in full: `swinv2_mm.datasets.labels.CheckLabels`.
"""

import numpy as np
from mmcv.transforms import BaseTransform

from ..arguments import Positive, check_arguments
from ..registry import TRANSFORMS


@TRANSFORMS.register_module()
@check_arguments()
class CheckLabels(BaseTransform):
    """Refuse a label map that would train nonsense, or stop a GPU in the middle of a loss without a name.

    Placed after `LoadAnnotations` of mmsegmentation:

        dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='swinv2_mm.datasets.labels.CheckLabels', num_classes=150),

    Takes `gt_seg_map` (H, W) and `ori_shape`, and changes nothing. Palette images of one index for each pixel are fine:
    mmsegmentation reads the index, not the colour.

    Args:
        num_classes: Labels are 0 to num_classes - 1, and `ignore_index`.
        ignore_index: Label of pixels that do not count.

    Raises:
        ValueError: The map holds colours, has another size than the image, or another label than these.
    """

    def __init__(self, num_classes: Positive, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def transform(self, results: dict) -> dict:
        """Check the label map of one image."""
        labels, path = results['gt_seg_map'], results.get('seg_map_path')
        if labels.ndim != 2:
            raise ValueError(
                f'label map {path} has the shape {labels.shape} of an image with colours: it must hold one index for '
                'each pixel, as a grey or palette PNG'
            )
        if labels.shape != tuple(results['ori_shape']):
            raise ValueError(
                f'label map {path} is of size {labels.shape}, its image of size {tuple(results["ori_shape"])}: '
                'is it the map of this image?'
            )
        present = np.unique(labels)
        wrong = present[(present >= self.num_classes) & (present != self.ignore_index)]
        if wrong.size:
            shift = ', and counts from 1 in the file' if results.get('reduce_zero_label') else ''
            raise ValueError(
                f'label map {path} holds {wrong.tolist()}: labels are 0 to {self.num_classes - 1}, or '
                f'{self.ignore_index} where it does not count{shift}. Mend the map or num_classes'
            )
        return results

    def __repr__(self) -> str:
        """Name and arguments."""
        return f'{type(self).__name__}(num_classes={self.num_classes}, ignore_index={self.ignore_index})'
