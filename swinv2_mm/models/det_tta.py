"""Test-time augmentation for instance segmentation; mmdet's own merges only boxes.

This module imports mmdet, so a config gives its full path: `swinv2_mm.models.det_tta.InstanceSegTTAModel`.
"""

from collections.abc import Sequence

import torch
from mmdet.models.roi_heads import CascadeRoIHead, HybridTaskCascadeRoIHead, SCNetRoIHead, SparseRoIHead
from mmdet.models.test_time_augs import DetTTAModel, merge_aug_masks
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi, bbox_flip, get_box_wh, scale_boxes
from mmengine.config import ConfigDict
from torch import Tensor

from ..arguments import check_arguments
from ..registry import MODELS

META_KEYS = ('ori_shape', 'scale_factor', 'flip', 'flip_direction')
FLIPPED_AXES = dict(horizontal=(-1,), vertical=(-2,), diagonal=(-2, -1))


@MODELS.register_module()
@check_arguments()
class InstanceSegTTAModel(DetTTAModel):
    """Merges boxes and masks of a Cascade Mask R-CNN or an HTC over scales and flips.

    There are two passes over the views, as in the HTC of ViT-Adapter (`htc_aug.py`): the boxes of all views are merged;
    then each view predicts masks for the merged boxes, whose probabilities are averaged before they are pasted once.
    Only one view's features are in memory at a time. They are computed twice, so the backbone runs twice per view.

    Boxes with a score above `test_cfg.rcnn.score_thr` are merged by a single NMS, that of `tta_cfg`. NMS is off within
    each view, because soft-NMS would lower the scores twice. A single view gives the same result as the plain detector
    if `tta_cfg` has the `nms` and `max_per_img` of `test_cfg.rcnn`.

    For a detector without masks, this is mmdet's `DetTTAModel` with `size_limits`.

    In a config, together with a `tta_pipeline`:

        tta_model = dict(
            type='swinv2_mm.models.det_tta.InstanceSegTTAModel',
            tta_cfg=dict(nms=dict(type='soft_nms', iou_threshold=0.5), max_per_img=100),
        )

    Args:
        tta_cfg: `nms` (of mmcv's `batched_nms`) and `max_per_img` for the merged boxes.
        size_limits: (min, max) for each scale, in the order of the pipeline's `TestTimeAug`, which must list its
            resizes before its flips. Keeps only boxes within that scale's range, min <= sqrt(width * height) < max in
            pixels of the original image, so that small scales contribute only large objects. Default: no limits.
        **kwargs: `module`, the detector, and `data_preprocessor`, as for mmengine's `BaseTTAModel`.

    Raises:
        TypeError: An argument is unknown or of another type.
        ValueError: A limit is not a valid range, or the mask head is not that of a Cascade Mask R-CNN or HTC.
    """

    def __init__(self, tta_cfg: dict, size_limits: Sequence[Sequence[float]] | None = None, **kwargs) -> None:
        super().__init__(tta_cfg=ConfigDict(tta_cfg), **kwargs)
        self.size_limits = size_limits
        for limits in size_limits or ():
            if len(limits) != 2 or not 0 <= limits[0] < limits[1]:
                raise ValueError(f'size_limits: {limits} must be (min, max) with 0 <= min < max, in pixels')
        if self.module.with_mask:
            check_masks(self.module)

    @torch.no_grad()
    def test_step(self, data: dict) -> list[DetDataSample]:
        """Predict a batch of images.

        Args:
            data: `inputs` and `data_samples` of `TestTimeAug` after collation: for each view, a list over the images.

        Returns:
            For each image, a sample with `bboxes` (n, 4), `scores` (n), `labels` (n) and, for a detector with masks,
            `masks` (n, H, W), in coordinates of the original image.

        Raises:
            ValueError: The samples lack metainfo of resize and flip, or do not match `size_limits`.
        """
        for sample in (sample for view in data['data_samples'] for sample in view):
            check_meta(sample)
        if not self.module.with_mask:
            return super().test_step(data)
        views = [dict(zip(data, view, strict=True)) for view in zip(*data.values(), strict=True)]
        candidates = [self._predict_boxes(view) for view in views]
        samples = self.merge_preds(list(zip(*candidates, strict=True)))
        self._add_masks(samples, views)
        return samples

    def _merge_single_sample(self, data_samples: Sequence[DetDataSample]) -> DetDataSample:
        """See `DetTTAModel`: apply `size_limits`, then merge the views of one image into one sample."""
        if self.size_limits:
            for sample, limits in zip(data_samples, self._limits(data_samples), strict=True):
                keep_sizes(sample, *limits)
        return super()._merge_single_sample(data_samples)

    def _limits(self, data_samples: Sequence[DetDataSample]) -> list[tuple[float, float]]:
        """Size limits of each view. Views of the same scale are adjacent."""
        share, rest = divmod(len(data_samples), len(self.size_limits))
        factors = [tuple(sample.scale_factor) for sample in data_samples]
        if rest or any(factor != factors[i - i % share] for i, factor in enumerate(factors)):
            raise ValueError(
                f'size_limits has {len(self.size_limits)} entries, which do not match {len(factors)} views of scale '
                f'factors {factors}: give one for each scale, and list the resizes of TestTimeAug before the flips'
            )
        return [limits for limits in self.size_limits for _ in range(share)]

    def _predict_boxes(self, view: dict) -> list[DetDataSample]:
        """Boxes of one view before NMS, still flipped, but rescaled to the original image."""
        x, samples = self._extract(view)
        head = self.module.roi_head
        results = head.predict_bbox(
            x=x,
            batch_img_metas=[sample.metainfo for sample in samples],
            rpn_results_list=self.module.rpn_head.predict(x, samples, rescale=False),
            rcnn_test_cfg=ConfigDict(head.test_cfg, nms=None, max_per_img=-1),
            rescale=True,
            **semantic_feat(head, x),
        )
        return self.module.add_pred_to_datasample(samples, results)

    def _add_masks(self, samples: list[DetDataSample], views: list[dict]) -> None:
        """Add masks to the merged boxes of each image."""
        head = self.module.roi_head
        boxes = [sample.pred_instances.bboxes for sample in samples]
        total = [0.0] * len(samples)
        for view in views if any(map(len, boxes)) else ():
            total = [t + p for t, p in zip(total, self._predict_masks(view, boxes), strict=True)]
        head.mask_head[-1].predict_by_feat(
            mask_preds=[t / len(views) for t in total],
            results_list=[sample.pred_instances for sample in samples],
            batch_img_metas=[dict(ori_shape=sample.ori_shape, scale_factor=(1.0, 1.0)) for sample in samples],
            rcnn_test_cfg=head.test_cfg,
            rescale=True,
            activate_map=True,
        )

    def _predict_masks(self, view: dict, boxes: list[Tensor]) -> list[Tensor]:
        """Mask probabilities (n, classes, h, w) of boxes (n, 4) of each original image, flipped back, in float32."""
        x, samples = self._extract(view)
        metas = [sample.metainfo for sample in samples]
        rois = bbox2roi([to_view(b, meta) for b, meta in zip(boxes, metas, strict=True)])
        stages = mask_logits(self.module.roi_head, x, rois)
        # without metainfo, merge_aug_masks only averages the stages: its unflipping fails on tensors (negative strides)
        masks = merge_aug_masks([logits.float().sigmoid() for logits in stages], {})
        return [unflip(m, meta) for m, meta in zip(masks.split([len(b) for b in boxes]), metas, strict=True)]

    def _extract(self, view: dict) -> tuple[tuple[Tensor, ...], list[DetDataSample]]:
        """Features (B, C, H_i, W_i) and samples of one view."""
        view = self.module.data_preprocessor(view, False)
        return self.module.extract_feat(view['inputs']), view['data_samples']


def check_masks(detector: torch.nn.Module) -> None:
    """Raise a ValueError unless the mask head is that of a Cascade Mask R-CNN or an HTC."""
    head = getattr(detector, 'roi_head', None)
    if not isinstance(head, CascadeRoIHead) or isinstance(head, (SCNetRoIHead, SparseRoIHead)):
        raise ValueError(
            f'InstanceSegTTAModel merges masks of CascadeRoIHead and HybridTaskCascadeRoIHead, not those of '
            f'{type(detector).__name__} with {type(head).__name__}: test it without test-time augmentation'
        )


def check_meta(sample: DetDataSample) -> None:
    """Raise a ValueError if a sample lacks metainfo of resize and flip."""
    missing = [key for key in META_KEYS if key not in sample.metainfo]
    if missing:
        raise ValueError(
            f'data sample without {", ".join(missing)}: the TestTimeAug of tta_pipeline needs Resize, RandomFlip '
            f'(prob=0.0 for no flips) and PackDetInputs with these among its meta_keys'
        )


def keep_sizes(sample: DetDataSample, low: float, high: float) -> None:
    """Keep only boxes with sqrt(area) in [low, high)."""
    width, height = get_box_wh(sample.pred_instances.bboxes)
    size = (width * height).sqrt()
    sample.pred_instances = sample.pred_instances[(size >= low) & (size < high)]


def to_view(boxes: Tensor, meta: dict) -> Tensor:
    """Map boxes (n, 4) of the original image to the coordinates of a view."""
    if meta['flip']:
        boxes = bbox_flip(boxes, meta['ori_shape'], meta['flip_direction'])
    return scale_boxes(boxes, meta['scale_factor'])


def unflip(masks: Tensor, meta: dict) -> Tensor:
    """Undo the flip of a view for masks (..., h, w)."""
    return masks.flip(FLIPPED_AXES[meta['flip_direction']]) if meta['flip'] else masks


def semantic_feat(head: CascadeRoIHead, x: tuple[Tensor, ...]) -> dict:
    """Extra arguments of HTC's box and mask branches: features of the semantic branch, None without one."""
    if not isinstance(head, HybridTaskCascadeRoIHead):
        return {}
    return dict(semantic_feat=head.semantic_head(x)[1] if head.with_semantic else None)


def mask_logits(head: CascadeRoIHead, x: tuple[Tensor, ...], rois: Tensor) -> list[Tensor]:
    """Mask logits (n, classes, h, w) to be averaged: of each stage for Cascade, of the last stage for HTC."""
    if isinstance(head, HybridTaskCascadeRoIHead):
        return head._mask_forward(-1, x, rois, **semantic_feat(head, x), training=False)['mask_preds']
    return [head._mask_forward(stage, x, rois)['mask_preds'] for stage in range(head.num_stages)]
