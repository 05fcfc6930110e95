"""InstaBoost with a semantic map, for HTC.

This module imports mmdet, so a config gives its full path: `swinv2_mm.datasets.transforms.InstaBoost`.
"""

import numpy as np
from mmdet.datasets.transforms import InstaBoost as InstaBoostWithoutMap
from mmdet.structures.bbox import HorizontalBoxes, autocast_box_type
from mmdet.structures.mask import BitmapMasks

from ..arguments import check_arguments
from ..registry import TRANSFORMS


@TRANSFORMS.register_module()
@check_arguments()
class InstaBoost(InstaBoostWithoutMap):
    """Move instances to nearby places in the image, the masks and the semantic map.

    InstaBoost (arXiv 1908.07801) cuts out the instances of an image, in-paints the background and pastes them
    elsewhere; instances whose boxes overlap move as a group. mmdet's transform does not update the semantic map, which
    HTC is trained on, and fails with NumPy >= 1.24 if a moved mask has several parts. Place this one after
    `LoadAnnotations`, unlike mmdet's:

        dict(type='LoadAnnotations', with_bbox=True, with_mask=True, with_seg=True),
        dict(type='swinv2_mm.datasets.transforms.InstaBoost'),

    Changes `img` (H, W, 3), `gt_bboxes`, `gt_bboxes_labels`, `gt_ignore_flags`, `gt_masks` (to bitmaps), and, if
    present, `gt_seg_map` (H, W) of uint8:

    - Pixels of the semantic map move with those of the image. In-painted pixels become `ignore_index` (255).
    - Pixels of a mask that another instance covers are removed. Boxes are recomputed from the masks. Instances without
      a remaining pixel are removed.
    - Ignored instances, such as crowds, and instances with empty masks are not moved.

    Args:
        action_candidate: Possible actions on a group of instances: 'normal', 'horizontal', 'vertical' or 'skip'. Groups
            at the image border are not flipped, so that 'normal' or 'skip' must be among them.
        action_prob: Probability of each action.
        scale: Minimum and maximum scale.
        dx: Instances move horizontally by at most their width / dx.
        dy: Instances move vertically by at most their height / dy.
        theta: Minimum and maximum rotation in degrees.
        color_prob: Probability of changing the colours of the image.
        hflag: Whether to draw places from a heatmap of similar surroundings, which is slow.
        aug_ratio: Probability of augmenting an image.

    Raises:
        ImportError: The package instaboostfast, or one of its dependencies, is not installed.
        ValueError: There are no masks, because `LoadAnnotations` comes later or loads none; or the semantic map is not
            uint8.
    """

    def __init__(self, *args, **kwargs) -> None:
        try:
            super().__init__(*args, **kwargs)
        except ImportError as error:
            raise ImportError(
                f'InstaBoost needs the package instaboostfast ({error.__context__ or error}): '
                'pip install scikit-image && pip install --no-deps instaboostfast '
                '(with its dependencies, pip would install opencv-python over any other build of OpenCV)'
            ) from error

    @autocast_box_type()
    def transform(self, results: dict) -> dict:
        """Move the instances with probability `aug_ratio`."""
        _check(results)
        masks = results['gt_masks'].to_ndarray().astype(np.uint8)  # a copy
        moving = masks.any((1, 2)) & ~results['gt_ignore_flags']
        if not moving.any() or np.random.rand() >= self.aug_ratio:
            return results
        img, seg_map = results['img'], results.get('gt_seg_map')
        moved_img, masks[moving], seg_map = _move(
            img.astype(np.uint8), masks[moving], seg_map, results.get('ignore_index', 255), self.cfg
        )
        boxes = results['gt_bboxes'].clone()
        boxes.tensor[moving] = _boxes(masks[moving])
        left = masks.any((1, 2)) | ~moving
        results['img'] = moved_img.astype(img.dtype)
        results['gt_masks'] = BitmapMasks(masks[left], *masks.shape[1:])
        results['gt_bboxes'] = boxes[left]
        for key in ('gt_bboxes_labels', 'gt_ignore_flags'):
            results[key] = results[key][left]
        if seg_map is not None:
            results['gt_seg_map'] = seg_map
        return results


def _check(results: dict) -> None:
    if 'gt_masks' not in results:
        raise ValueError(
            'swinv2_mm.datasets.transforms.InstaBoost found no gt_masks: place it after '
            'LoadAnnotations(with_bbox=True, with_mask=True), not before it as InstaBoost of mmdet'
        )
    seg_map = results.get('gt_seg_map')
    if seg_map is not None and seg_map.dtype != np.uint8:
        raise ValueError(f'InstaBoost supports only semantic maps of uint8, got {seg_map.dtype}')


def _move(
    img: np.ndarray, masks: np.ndarray, seg_map: np.ndarray | None, ignore_index: int, config: object
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Move the instances in an image (H, W, 3), masks (n, H, W) and semantic map (H, W). No mask may be empty."""
    from instaboostfast import get_new_data
    from instaboostfast.affine_transform import transform_image
    from instaboostfast.get_instance_group import extract
    from instaboostfast.pointByHeatmap import paste_position

    objects = [
        dict(category_id=0, bbox=[x1, y1, x2 - x1, y2 - y1], segmentation=_run_lengths(mask))
        for mask, (x1, y1, x2, y2) in zip(masks, _boxes(masks).tolist(), strict=True)
    ]
    background, pieces, moves, bounds, groups = extract(objects, img, config)
    if config.heatmap_flag:
        for move, (y, x) in zip(moves, paste_position(objects, img, groups, bounds), strict=True):
            if y != -1:  # otherwise no place was found
                move.update(tx=x, ty=y)
    img = transform_image(background, pieces, moves)
    _, img = get_new_data([], img, config)  # without objects, it only changes the colours

    moved_masks = np.zeros_like(masks)
    moved_map = None if seg_map is None else np.where(masks.any(0), np.uint8(ignore_index), seg_map)
    for move, bound, group in zip(moves, bounds, groups, strict=True):  # in the order of pasting
        pasted = _place(masks[group].any(0), move, bound) > 0
        moved_masks[:, pasted] = 0
        for i in group:
            moved_masks[i] = _place(masks[i], move, bound)
        if seg_map is not None:
            moved_map[pasted] = _place(seg_map, move, bound)[pasted]
    return img, moved_masks, moved_map


def _place(values: np.ndarray, move: dict, bound: list[int]) -> np.ndarray:
    """Move the part of (H, W) uint8 values within `bound` like instaboostfast moves that part of the image."""
    from instaboostfast.affine_transform import __transform_img as place

    x1, y1, x2, y2 = bound
    piece = values[y1:y2, x1:x2]
    if 'flip' in move:
        piece = np.flip(piece, 1 if move['flip'] == 'horizontal' else 0)
    return place(piece, move, values.shape, order=0)


def _boxes(masks: np.ndarray):
    """Bounding boxes (n, 4) of masks (n, H, W), as (x1, y1, x2, y2) in whole pixels."""
    return HorizontalBoxes.from_instance_masks(BitmapMasks(masks, *masks.shape[1:])).tensor


def _run_lengths(mask: np.ndarray) -> dict:
    """Encode a mask (H, W) of 0 and 1 as COCO's uncompressed RLE: column-major, starting with a run of zeros."""
    columns = mask.ravel(order='F')
    starts = np.flatnonzero(np.diff(columns, prepend=0))
    return dict(size=list(mask.shape), counts=np.diff(starts, prepend=0, append=columns.size).tolist())
