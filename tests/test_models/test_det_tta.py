"""Test-time augmentation of boxes and masks against the plain detector, mirrored images and values computed by hand."""

import copy
import functools
import itertools
import json
import math
import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import oracles
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch.nn import functional as F

pytest.importorskip('mmdet')
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.detectors import BaseDetector
from mmdet.models.roi_heads import CascadeRoIHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from swinv2_mm.models.det_tta import InstanceSegTTAModel

DEMO = Path(__file__).parents[2] / 'configs' / 'det' / 'htc_swinv2_demo.py'
NMS = dict(type='nms', iou_threshold=0.5)
SOFT_NMS = dict(type='soft_nms', iou_threshold=0.2)  # lowers most scores of a random detector
KINDS = ('cascade', 'htc')
# std of the weights of the last layers, so that scores have no ties and masks have edges
SPREAD = dict(fc_cls=0.7, fc_reg=0.5, conv_logits=2.0, rpn_cls=1.0)
HTC_ONLY = ('interleaved', 'mask_info_flow', 'semantic_roi_extractor', 'semantic_head')


@pytest.fixture(autouse=True)
def _mmdet_scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


# --- detectors and views ----------------------------------------------------------------------------------------------


def config(kind: str, masks: bool = True) -> ConfigDict:
    """The demo's HTC with FPN only, 16 channels and 32 proposals, or a Cascade Mask R-CNN of the same parts."""
    cfg = copy.deepcopy(Config.fromfile(DEMO).model)
    roi = cfg.roi_head
    cfg.backbone.update(arch=dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)), window_size=4)
    cfg.neck = dict(cfg.neck[1], in_channels=[16, 32, 64, 128], out_channels=16)
    cfg.rpn_head.update(in_channels=16, feat_channels=16)
    for extractor in (roi.bbox_roi_extractor, roi.mask_roi_extractor, roi.semantic_roi_extractor):
        extractor.out_channels = 16
    for head in (*roi.mask_head, roi.semantic_head):
        head.update(in_channels=16, conv_out_channels=16)
    for head in roi.bbox_head:
        head.update(in_channels=16, fc_out_channels=32)
    cfg.train_cfg = None
    cfg.test_cfg.rpn.max_per_img = 32
    if kind == 'cascade':
        cfg.type, roi.type = 'CascadeRCNN', 'CascadeRoIHead'
        for key in HTC_ONLY:
            roi.pop(key)
        for head in roi.mask_head:
            head.pop('with_conv_res', None)
            head.type = 'FCNMaskHead'
    if not masks:
        roi.pop('mask_head')
        roi.pop('mask_roi_extractor')
    return cfg


def detector(kind: str, nms: dict = NMS, masks: bool = True) -> BaseDetector:
    """A random detector whose scores and masks differ from box to box."""
    model = copy.deepcopy(build(kind, masks))
    model.roi_head.test_cfg.nms = ConfigDict(nms)
    return model


@functools.cache
def build(kind: str, masks: bool) -> BaseDetector:
    """The model that `detector` copies."""
    torch.manual_seed(0)
    model = MODELS.build(config(kind, masks))
    oracles.randomize(model.backbone)
    with torch.no_grad():
        for name, p in model.named_parameters():
            for part, spread in SPREAD.items():
                if name.endswith(f'{part}.weight'):
                    p.normal_(std=spread)
    return model.eval()


def tta(model: BaseDetector, nms: dict = NMS, **kwargs) -> InstanceSegTTAModel:
    """Test-time augmentation with the NMS of the detector."""
    return InstanceSegTTAModel(dict(nms=nms, max_per_img=20), module=model, **kwargs)


def image(height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    """Coarse noise (3, H, W) of uint8."""
    noise = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed)) * 255
    return F.interpolate(noise, (height, width), mode='bilinear')[0].to(torch.uint8)


def view(image: torch.Tensor, scale: float = 1, flip: str | None = None) -> tuple[torch.Tensor, DetDataSample]:
    """An image resized and flipped, with the metainfo of a pipeline."""
    ori_shape = tuple(image.shape[1:])
    if scale != 1:
        image = F.interpolate(image[None].float(), scale_factor=scale, mode='bilinear')[0].to(torch.uint8)
    if flip:
        image = image.flip(dict(horizontal=[-1], vertical=[-2], diagonal=[-2, -1])[flip])
    shape = tuple(image.shape[1:])
    factors = (shape[1] / ori_shape[1], shape[0] / ori_shape[0])
    meta = dict(ori_shape=ori_shape, img_shape=shape, scale_factor=factors, flip=bool(flip), flip_direction=flip)
    return image, DetDataSample(metainfo=meta)


def batch(*views: list[tuple[torch.Tensor, DetDataSample]]) -> dict:
    """Each view as a list over images, as after TestTimeAug and collation."""
    return dict(inputs=[[i for i, _ in v] for v in views], data_samples=[[s for _, s in v] for v in views])


@torch.no_grad()
def plain(model: BaseDetector, *views: tuple[torch.Tensor, DetDataSample]) -> list[InstanceData]:
    data = dict(inputs=[i for i, _ in views], data_samples=[s for _, s in views])
    return [sample.pred_instances for sample in model.test_step(data)]


def predict(model: InstanceSegTTAModel, *views: list[tuple[torch.Tensor, DetDataSample]]) -> list[InstanceData]:
    return [sample.pred_instances for sample in model.test_step(batch(*views))]


def flipped_back(results: InstanceData, shape: tuple[int, int], direction: str) -> InstanceData:
    x0, y0, x1, y1 = results.bboxes.unbind(1)
    masks = results.masks
    if direction in ('horizontal', 'diagonal'):
        x0, x1, masks = shape[1] - x1, shape[1] - x0, masks.flip(-1)
    if direction in ('vertical', 'diagonal'):
        y0, y1, masks = shape[0] - y1, shape[0] - y0, masks.flip(-2)
    return InstanceData(
        bboxes=torch.stack([x0, y0, x1, y1], 1), scores=results.scores, labels=results.labels, masks=masks
    )


def sizes(results: InstanceData) -> torch.Tensor:
    """Square roots of the boxes' areas."""
    return (results.bboxes[:, 2:] - results.bboxes[:, :2]).prod(1).sqrt()


def assert_same(got: InstanceData, expected: InstanceData, atol: float = 1e-4) -> None:
    """Boxes within `atol` pixels, scores within 1e-4, and at most 0.1 % of the foreground pixels of masks differ."""
    assert len(got) == len(expected) > 0
    torch.testing.assert_close(got.bboxes, expected.bboxes, rtol=0, atol=atol)
    torch.testing.assert_close(got.scores, expected.scores, rtol=0, atol=1e-4)
    assert torch.equal(got.labels, expected.labels)
    assert got.masks.shape == expected.masks.shape
    assert (got.masks != expected.masks).sum() <= 1e-3 * expected.masks.sum()


# --- against the plain detector ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('kind', 'scale', 'nms'),
    [('cascade', 1, NMS), ('cascade', 1.37, SOFT_NMS), ('htc', 1, SOFT_NMS), ('htc', 1.37, NMS)],
)
def test_tta_of_one_view_equals_the_plain_detector(kind, scale, nms):
    model = detector(kind, nms)
    expected = plain(model, view(image(), scale))[0]
    assert len(expected) == 20
    assert 0.02 < expected.masks.sum() / sizes(expected).square().sum() < 0.9
    got = predict(tta(model, nms), [view(image(), scale)])[0]
    assert_same(got, expected)
    if scale == 1:
        assert torch.equal(got.masks, expected.masks)


@pytest.mark.parametrize(
    ('kind', 'direction', 'scale'),
    [('htc', 'horizontal', 1), ('cascade', 'vertical', 1), ('htc', 'diagonal', 2)],
)
def test_tta_of_a_flipped_view_equals_the_plain_detector_on_the_flipped_image(kind, direction, scale):
    model = detector(kind)
    mirrored = view(image(), flip=direction)[0]
    expected = flipped_back(plain(model, view(mirrored, scale))[0], (64, 96), direction)
    assert_same(predict(tta(model), [view(image(), scale, direction)])[0], expected)


def test_tta_of_the_same_view_twice_equals_once():
    model = tta(detector('htc'))
    (once,) = predict(model, [view(image(), 1.5)])
    (twice,) = predict(model, [view(image(), 1.5)], [view(image(), 1.5)])
    for key, value in once.items():
        assert torch.equal(value, twice[key]), key


@pytest.mark.parametrize('kind', KINDS)
def test_tta_images_of_a_batch_are_independent(kind):
    model, images = tta(detector(kind)), [image(seed=0), image(seed=1)]
    views = [(1, None), (1.5, None), (1.5, 'horizontal')]
    together = predict(model, *([view(i, *v) for i in images] for v in views))
    for i, results in zip(images, together, strict=True):
        assert_same(results, predict(model, *([view(i, *v)] for v in views))[0], atol=1e-3)


def test_tta_without_masks_equals_det_tta_model():
    model = detector('htc', masks=False)
    views = [[view(image())], [view(image(), 2, 'horizontal')]]
    cfg = ConfigDict(nms=NMS, max_per_img=20)
    (expected,) = DetTTAModel(tta_cfg=cfg, module=model).test_step(batch(*views))
    (got,) = predict(tta(model), *views)
    assert set(got.keys()) == {'bboxes', 'scores', 'labels'}
    for key, value in expected.pred_instances.items():
        assert torch.equal(value, got[key])


def test_tta_without_detections_gives_empty_masks_of_the_original_size():
    model = detector('cascade')
    model.roi_head.test_cfg.score_thr = 1.0
    (got,) = predict(tta(model), [view(image(), 2)], [view(image(), 2, 'horizontal')])
    assert got.masks.shape == (0, 64, 96)
    assert got.masks.dtype == torch.bool
    assert (got.bboxes.shape, got.scores.shape, got.labels.shape) == ((0, 4), (0,), (0,))


def test_tta_with_an_empty_image_in_a_batch_of_different_sizes():
    model = detector('htc')
    pictures = [image(), torch.full((3, 48, 80), 128, dtype=torch.uint8)]
    highest = [r.scores.max() for r in plain(model, *map(view, pictures))]
    model.roi_head.test_cfg.score_thr = float(sum(highest) / 2)
    results = predict(tta(model), [view(p) for p in pictures])
    assert [len(r) > 0 for r in results] == [h > model.roi_head.test_cfg.score_thr for h in highest]
    assert [r.masks.shape for r in results] == [(len(results[0]), 64, 96), (len(results[1]), 48, 80)]


def test_tta_averages_masks_in_float32_under_autocast():
    model, (picture, sample) = tta(detector('cascade')), view(image())  # over stages, and over views
    box = torch.tensor([[8.0, 8.0, 60.0, 50.0]])
    with torch.autocast('cpu', dtype=torch.bfloat16), torch.no_grad():
        features = model._extract(dict(inputs=[picture], data_samples=[sample]))[0]
        (maps,) = model._predict_masks(dict(inputs=[picture], data_samples=[sample]), [box])
        (got,) = predict(model, [view(image())], [view(image(), 1.5, 'horizontal')])
    assert features[0].dtype == torch.bfloat16
    assert maps.dtype == torch.float32
    assert got.masks.shape == (20, 64, 96)
    assert got.scores.isfinite().all()


# --- by hand ----------------------------------------------------------------------------------------------------------


class KnownHead(CascadeRoIHead):
    """Returns known boxes, at the original size, and mask probabilities of three boxes for each view.

    The features are the index of the view.
    """

    def __init__(self, boxes: dict, maps: dict) -> None:
        torch.nn.Module.__init__(self)
        self.boxes, self.maps, self.rois = boxes, maps, {}
        self.num_stages, self.test_cfg = 2, ConfigDict(score_thr=0.0, mask_thr_binary=0.5, nms=NMS, max_per_img=9)
        self.mask_head = torch.nn.ModuleList([FCNMaskHead(num_convs=0, num_classes=2, in_channels=4)])

    def predict_bbox(self, x, **_):
        return [
            InstanceData(bboxes=torch.tensor(b), scores=torch.tensor(s), labels=torch.tensor(labels))
            for b, s, labels in [self.boxes[x]]
        ]

    def _mask_forward(self, stage, x, rois):
        self.rois[x] = rois.tolist()
        return dict(mask_preds=torch.logit(self.maps[x] + (0.05, -0.05)[stage])[:, None].expand(-1, 2, -1, -1))


class KnownDetector(torch.nn.Module):
    """Passes the index of the view, which is the pixel value of the image, to `KnownHead`."""

    with_mask = True
    test_step = BaseDetector.test_step
    add_pred_to_datasample = BaseDetector.add_pred_to_datasample

    def __init__(self, **known: dict) -> None:
        super().__init__()
        self.data_preprocessor, self.roi_head = DetDataPreprocessor(), KnownHead(**known)
        self.rpn_head = SimpleNamespace(predict=lambda *_, **__: None)

    def extract_feat(self, inputs):
        return int(inputs.flatten()[0])


A, B, C = [2.0, 2.0, 6.0, 6.0], [8.0, 4.0, 12.0, 8.0], [4.0, 0.0, 16.0, 12.0]


def three_views() -> tuple[KnownDetector, dict]:
    """An image of 12x16: as it is, flipped, and doubled; A is found twice, B in the flipped view, C in the doubled one.

    Maps have the size of A and B, 4x4, and so are pasted there pixel for pixel.
    """
    column = torch.tensor([0.9, 0.1, 0.1, 0.1]).expand(4, 4)
    flat = torch.ones(4, 4)
    known = dict(
        boxes={
            0: ([A], [0.9], [0]),
            1: ([[10.0, 2.0, 14.0, 6.0], [4.0, 4.0, 8.0, 8.0]], [0.8, 0.7], [0, 1]),
            2: ([C], [0.6], [0]),
        },
        maps={  # of A, B, C as each view sees them; their means: 0.63 in A's first column, 0.53 in B, 0.43 in C
            0: torch.stack([column, flat * 0.9, flat * 0.9]),
            1: torch.stack([column.flip(-1), flat * 0.3, flat * 0.3]),
            2: torch.stack([flat * 0.1, flat * 0.4, flat * 0.1]),
        },
    )
    pictures = [torch.zeros(3, 12, 16)] * 3
    views = [view(pictures[0]), view(pictures[1], flip='horizontal'), view(pictures[2], 2)]
    views = [[(torch.full_like(picture, i), sample)] for i, (picture, sample) in enumerate(views)]
    return KnownDetector(**known), batch(*views)


def test_tta_of_three_known_views():
    model, data = three_views()
    (sample,) = tta(model).test_step(data)
    got = sample.pred_instances
    assert got.bboxes.tolist() == [A, B, C]
    assert got.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert got.labels.tolist() == [0, 1, 0]
    expected = torch.zeros(3, 12, 16, dtype=torch.bool)
    expected[0, 2:6, 2] = True
    expected[1, 4:8, 8:12] = True
    assert torch.equal(got.masks, expected)
    flipped = [[10.0, 2.0, 14.0, 6.0], [4.0, 4.0, 8.0, 8.0], [0.0, 0.0, 12.0, 12.0]]
    assert model.roi_head.rois == {
        0: [[0.0, *A], [0.0, *B], [0.0, *C]],
        1: [[0.0, *box] for box in flipped],
        2: [[0.0, *(2 * v for v in box)] for box in (A, B, C)],
    }


def test_tta_soft_nms_lowers_a_score_once():
    model, data = three_views()
    model.roi_head.boxes[1][0][0] = [10.0, 2.0, 14.0, 5.0]  # of A's upper three quarters
    model.roi_head.maps = {i: torch.cat([m, m[2:]]) for i, m in model.roi_head.maps.items()}
    (sample,) = tta(model, SOFT_NMS).test_step(data)
    scores = sample.pred_instances.scores.tolist()
    assert scores == pytest.approx([0.9, 0.7, 0.6, 0.8 * (1 - 12 / 16)], rel=1e-5)


@pytest.mark.parametrize(
    ('limits', 'expected'),
    [
        ([(0, math.inf)] * 3, [A, B, C]),
        ([(0, 4), (0, math.inf), (0, math.inf)], [A, B, C]),  # A from the flipped view
        ([(0, 4), (0, 4), (0, 99)], [C]),  # A and B have size 4: the upper limit is out
        ([(4, 5), (5, 99), (4, 12.5)], [A, C]),  # and the lower one in
        ([(0, math.inf), (0, math.inf), (0, 12)], [A, B]),
        ([(9, 10), (9, 10), (9, 10)], []),
    ],
)
def test_tta_size_limits_of_known_views(limits, expected):
    model, data = three_views()
    model.roi_head.maps = {i: m[: len(expected)] for i, m in model.roi_head.maps.items()}
    (sample,) = tta(model, size_limits=limits).test_step(data)
    assert sample.pred_instances.bboxes.tolist() == expected
    assert sample.pred_instances.masks.shape == (len(expected), 12, 16)


@pytest.mark.parametrize('masks', [True, False])
def test_tta_size_limits_apply_to_scales_in_pixels_of_the_original_image(masks):
    """Without suppression, the result is the union of the boxes within the limits of each scale."""
    model = detector('cascade', masks=masks)
    model.roi_head.test_cfg.score_thr = 0.2
    keep_all = dict(nms=dict(type='nms', iou_threshold=1.0), max_per_img=1000)
    scales = [[[view(image(), s, f)] for f in (None, 'horizontal')] for s in (1, 2)]
    whole = InstanceSegTTAModel(keep_all, module=model)
    small_view, large_view = (predict(whole, *views)[0] for views in scales)
    expected = InstanceData.cat([small_view[sizes(small_view) >= 16], large_view[sizes(large_view) < 16]])
    assert 0 < len(expected) < len(small_view) + len(large_view)
    limited = InstanceSegTTAModel(keep_all, size_limits=[(16, math.inf), (0, 16)], module=model)
    (got,) = predict(limited, *scales[0], *scales[1])
    order = expected.scores.argsort(descending=True)
    torch.testing.assert_close(got.scores, expected.scores[order])
    torch.testing.assert_close(got.bboxes, expected.bboxes[order])


# --- memory -----------------------------------------------------------------------------------------------------------


def test_tta_has_features_of_one_view_at_a_time():
    model = detector('htc')
    features, alive = [], []  # weak references, and how many of them live
    model.backbone.register_forward_pre_hook(lambda *_: alive.append(sum(f() is not None for f in features)))
    for part in (model.backbone, model.neck):
        part.register_forward_hook(lambda _, __, out: features.extend(weakref.ref(o) for o in out))
    views = [[view(image(), s, f)] for s in (1, 1.5, 2) for f in (None, 'horizontal')]
    results = tta(model).test_step(batch(*views))
    assert len(results[0].pred_instances) == 20
    assert alive == [0] * 12  # at the start of the backbone: once for boxes and once for masks of six views
    assert not any(f() is not None for f in features)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('limits', [(5, 5), (-1, 5), (1, 2, 3)])
def test_tta_rejects_size_limits_that_are_no_range(limits):
    with pytest.raises(ValueError, match=r'size_limits.*0 <= min < max'):
        tta(three_views()[0], size_limits=[limits])


@pytest.mark.parametrize('number', [1, 2, 4])
def test_tta_rejects_size_limits_that_do_not_match_the_views(number):
    model, data = three_views()
    with pytest.raises(ValueError, match=r'size_limits.*resizes of TestTimeAug before the flips'):
        tta(model, size_limits=[(0, 9)] * number).test_step(data)


def test_tta_rejects_size_limits_with_flips_before_resizes():
    model = tta(detector('cascade'), size_limits=[(0, 24), (24, 99)])
    with pytest.raises(ValueError, match='before the flips'):
        predict(model, *([view(image(), s, f)] for f in (None, 'horizontal') for s in (1, 2)))


def test_tta_rejects_other_mask_heads():
    cfg = Config.fromstring("_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'", '.py').model
    cfg.backbone.init_cfg = None
    with torch.device('meta'), pytest.raises(ValueError, match='not those of MaskRCNN with StandardRoIHead'):
        InstanceSegTTAModel(dict(nms=NMS, max_per_img=20), module=cfg)


def test_tta_rejects_samples_without_flip_metainfo():
    model, data = three_views()
    data['data_samples'][2][0] = DetDataSample(metainfo=dict(ori_shape=(12, 16), scale_factor=(2.0, 2.0)))
    with pytest.raises(ValueError, match=r'without flip, flip_direction: .*meta_keys'):
        tta(model).test_step(data)


# --- Runner -----------------------------------------------------------------------------------------------------------


def write_mirrored_pair(root: Path) -> None:
    """Write an image, its mirror image, and one annotation for each."""
    pixels = image(60, 80).permute(1, 2, 0).numpy()
    cv2.imwrite(str(root / '1.png'), pixels)
    cv2.imwrite(str(root / '2.png'), np.ascontiguousarray(pixels[:, ::-1]))
    box = dict(iscrowd=0, bbox=[4, 4, 8, 8], area=64, segmentation=[[4, 4, 12, 4, 12, 12]], category_id=1)
    annotations = dict(
        images=[dict(id=i, file_name=f'{i}.png', height=60, width=80) for i in (1, 2)],
        annotations=[dict(box, id=i, image_id=i) for i in (1, 2)],
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(('disc', 'square', 'triangle'))],
    )
    (root / 'truth.json').write_text(json.dumps(annotations))


def runner_config(root: Path) -> Config:
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
    tta_pipeline = [
        dict(type='LoadImageFromFile'),
        dict(
            type='TestTimeAug',
            transforms=[
                [dict(type='Resize', scale=(s, s), keep_ratio=True) for s in (80, 160)],
                [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
                [dict(type='PackDetInputs', meta_keys=keys)],
            ],
        ),
    ]
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(
                type='swinv2_mm.models.det_tta.InstanceSegTTAModel',
                tta_cfg=dict(nms=NMS, max_per_img=20),
                module=config('htc'),
            ),
            test_dataloader=dict(
                batch_size=2,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=dict(
                    type='CocoDataset',
                    metainfo=dict(classes=('disc', 'square', 'triangle')),
                    data_root=str(root),
                    ann_file='truth.json',
                    data_prefix=dict(img=''),
                    test_mode=True,
                    pipeline=tta_pipeline,
                ),
            ),
            test_cfg=dict(type='TestLoop'),
            test_evaluator=[
                dict(type='CocoMetric', ann_file=str(root / 'truth.json'), metric=['bbox', 'segm']),
                dict(type='DumpDetResults', out_file_path=str(root / 'out.pkl')),
            ],
            work_dir=str(root / 'work'),
            load_from=str(root / 'weights.pth'),
            experiment_name=f'tta_{root.name}',
        )
    )


def test_tta_in_a_runner_gives_mirrored_results_for_mirrored_images(tmp_path):
    """With both flips, both images have the same views, and so the same results, whatever the weights."""
    from mmengine.runner import Runner
    from pycocotools import mask as coco_mask

    write_mirrored_pair(tmp_path)
    torch.save(dict(state_dict=detector('htc').state_dict()), tmp_path / 'weights.pth')
    figures = Runner.from_cfg(runner_config(tmp_path)).test()
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(figures)
    results = []
    for image_id, result in itertools.zip_longest((1, 2), pickle.loads((tmp_path / 'out.pkl').read_bytes())):
        assert result['img_id'] == image_id
        masks = torch.from_numpy(np.stack([coco_mask.decode(m) for m in result['pred_instances'].pop('masks')]))
        results.append(InstanceData(**result['pred_instances'], masks=masks.bool()))
    assert len(results[0]) == 20
    assert results[0].masks.any()
    assert_same(flipped_back(results[1], (60, 80), 'horizontal'), results[0], atol=1e-3)
