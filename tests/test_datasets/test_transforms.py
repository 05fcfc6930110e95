"""InstaBoost keeps image, masks, boxes and semantic map consistent.

Instances have flat colours, so that their position can be read from the image.
"""

import colorsys
import copy
import importlib.util
import json
import os
import random
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('mmdet')
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.registry import TRANSFORMS
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope

REPOSITORY = Path(__file__).parents[2]
DATA = Path(os.environ.get('SWINV2_MM_DATA', REPOSITORY.parent / 'shared' / 'data')) / 'coco_mini'
NAME = 'swinv2_mm.datasets.transforms.InstaBoost'
STRONG = dict(type=NAME, aug_ratio=1.0, color_prob=0.0, dx=3, dy=3, scale=(0.6, 1.5), theta=(-25, 25))
GRASS, IGNORE = 123, 255
BACKGROUND = (90, 90, 90)
needs_instaboost = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('instaboostfast', 'skimage')),
    reason='instaboostfast is not installed: pip install scikit-image && pip install --no-deps instaboostfast',
)
needs_coco_mini = pytest.mark.skipif(not DATA.is_dir(), reason=f'{DATA} does not exist')


def seed_all(seed: int = 0) -> None:
    random.seed(seed)
    np.random.seed(seed)


@pytest.fixture(autouse=True)
def _mmdet_scope_and_fixed_seed():
    seed_all()
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def colours(number: int) -> np.ndarray:
    """Colours that differ from each other and from the background, (number, 3)."""
    hues = [colorsys.hsv_to_rgb(i / number, 1.0, 1.0 - 0.5 * (i % 2)) for i in range(number)]
    return (np.array(hues).reshape(-1, 3) * 255).round().astype(np.uint8)


def rectangle(x1: int, y1: int, x2: int, y2: int) -> list[int]:
    return [x1, y1, x2, y1, x2, y2, x1, y2]


# (class in the semantic map, polygons); the label of an instance is its index
SCENE = [
    (0, [[60, 30, 95, 65, 60, 100, 25, 65]]),
    (16, [rectangle(150, 20, 180, 60), rectangle(185, 30, 215, 50)]),  # two parts
    (2, [rectangle(40, 130, 110, 200)]),
    (0, [rectangle(90, 160, 140, 220)]),  # overlaps the one before, so that both move as a group
    (40, [rectangle(230, 100, 270, 180)]),  # next to the one below
    (41, [rectangle(272, 100, 310, 180)]),
    (7, [rectangle(285, 0, 320, 40)]),  # at the border
]


def painted(scene: list, height: int = 240, width: int = 320, crowd: tuple[int, ...] = ()) -> dict:
    """Output of a dataset and `LoadAnnotations` for a scene: flat colours on grey, and a semantic map with grass."""
    img = np.full((height, width, 3), BACKGROUND, np.uint8)
    seg_map = np.full((height, width), GRASS, np.uint8)
    instances = []
    for label, (colour, (category, segmentation)) in enumerate(zip(colours(len(scene)), scene, strict=True)):
        instance = dict(bbox_label=label, mask=segmentation, ignore_flag=int(label in crowd), bbox=[0.0, 0.0, 0.0, 0.0])
        instances.append(instance)
        mask = masks_of([instance], height, width)[0] > 0
        if mask.any():
            ys, xs = np.nonzero(mask)
            instance['bbox'] = [float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
        img[mask] = colour
        seg_map[mask] = category
    results = dict(img=img, ori_shape=(height, width), img_shape=(height, width), instances=instances)
    LoadAnnotations(with_bbox=True, with_mask=True).transform(results)
    return results | dict(gt_seg_map=seg_map, ignore_index=IGNORE)


def masks_of(instances: list[dict], height: int, width: int) -> np.ndarray:
    results = dict(instances=copy.deepcopy(instances), ori_shape=(height, width))
    LoadAnnotations(with_bbox=False, with_label=False, with_mask=True).transform(results)
    return results['gt_masks'].to_ndarray()


def shown(img: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the instance that each pixel shows, or -1, and whether there is no edge within two pixels."""
    palette = np.concatenate((np.array([BACKGROUND]), colours(number))).astype(np.float32)
    distances = (palette**2).sum(-1) - 2 * img.astype(np.float32) @ palette.T  # squared, without the term |pixel|^2
    nearest = distances.argmin(-1).astype(np.int16) - 1
    kernel = np.ones((5, 5), np.uint8)
    clear = cv2.dilate(nearest, kernel) == cv2.erode(nearest, kernel)
    clear[[0, -1]] = clear[:, [0, -1]] = False  # there may be an edge just outside the image
    return nearest, clear


def assert_consistent(results: dict, scene: list) -> int:
    """Compare pixels away from edges with masks, boxes and semantic map; return the number of those on instances."""
    seen, clear = shown(results['img'], len(scene))
    masks = results['gt_masks'].to_ndarray().astype(bool)
    labels = results['gt_bboxes_labels'].tolist()
    assert len(labels) == len(masks) == len(results['gt_bboxes']) == len(results['gt_ignore_flags'])
    assert {int(i) for i in np.unique(seen[clear])} <= {-1, *labels}
    others = masks.sum(0)
    for label, mask, box in zip(labels, masks, results['gt_bboxes'].tensor.tolist(), strict=True):
        visible = (seen == label) & clear
        assert mask[visible].all(), f'instance {label} is visible outside its mask'
        assert (seen[mask & clear & (others == 1)] == label).all(), f'the mask of {label} covers another instance'
        assert (results['gt_seg_map'][visible] == scene[label][0]).all(), (
            f'the semantic map has another class than {label}'
        )
        ys, xs = np.nonzero(mask)
        assert np.abs(np.subtract(box, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))).max() <= 1
    empty = (seen == -1) & clear
    assert not masks[:, empty].any()
    assert np.isin(results['gt_seg_map'][empty], (GRASS, IGNORE)).all(), 'the semantic map still has a moved instance'
    return int((clear & (seen >= 0)).sum())


# --- InstaBoost -------------------------------------------------------------------------------------------------------


FLIPPED = dict(action_candidate=('normal', 'horizontal', 'vertical'), action_prob=(0.25, 0.5, 0.25))


@needs_instaboost
@pytest.mark.parametrize(
    ('how', 'seed'),
    [({}, 0), ({}, 1), (FLIPPED, 1), (FLIPPED, 2), (dict(hflag=True), 2)],
    ids=['moved', 'moved_2', 'flipped', 'flipped_2', 'heatmap'],
)
@pytest.mark.filterwarnings('ignore:invalid value encountered')  # from the heatmap, where all places are equal
def test_instaboost_moves_masks_boxes_and_semantic_map(how, seed):
    before = painted(SCENE)
    seed_all(seed)
    after = TRANSFORMS.build(STRONG | how).transform(copy.deepcopy(before))
    assert assert_consistent(after, SCENE) > 8000
    assert (after['gt_seg_map'] != before['gt_seg_map']).mean() > 0.02
    # the semantic map is unchanged where no instance was before or after
    touched = before['gt_masks'].to_ndarray().any(0) | after['gt_masks'].to_ndarray().any(0)
    assert (after['gt_seg_map'][~touched] == GRASS).all()
    gone = before['gt_masks'].to_ndarray().any(0) & ~after['gt_masks'].to_ndarray().any(0)
    assert gone.any()
    assert (after['gt_seg_map'][gone] == IGNORE).all()


@needs_instaboost
def test_instaboost_removes_covered_pixels_from_masks():
    apart = [SCENE[0], (3, [rectangle(102, 30, 170, 100)]), (5, [rectangle(180, 30, 250, 100)])]
    transform = TRANSFORMS.build(STRONG | dict(scale=(1.3, 1.5)))
    overlaps = 0
    for _ in range(5):
        after = transform.transform(painted(apart))
        assert_consistent(after, apart)
        masks = after['gt_masks'].to_ndarray()
        assert masks.sum(0).max() == 1
        whole = masks_of(painted(apart)['instances'], 240, 320).sum((1, 2)) * 1.3**2 * 0.98
        overlaps += int((masks.sum((1, 2)) < whole[after['gt_bboxes_labels']]).any())
    assert overlaps


@needs_instaboost
@pytest.mark.parametrize('hflag', [False, True])
def test_instaboost_image_equals_instaboostfast(hflag):
    """With masks of one part, for which the annotations of instaboostfast work with NumPy >= 1.24."""
    from instaboostfast import InstaBoostConfig, get_new_data

    scene = [SCENE[0], SCENE[2], SCENE[3], SCENE[4]]
    before = painted(scene)
    texture = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    before['img'] = cv2.resize(texture, (320, 240), interpolation=cv2.INTER_CUBIC)  # some places are similar, some not
    objects = [
        dict(category_id=i['bbox_label'], bbox=[x1, y1, x2 - x1, y2 - y1], segmentation=i['mask'])
        for i in before['instances']
        for x1, y1, x2, y2 in [i['bbox']]
    ]
    how = dict(dx=3, dy=3, scale=(0.6, 1.5), theta=(-25, 25), color_prob=1.0)
    seed_all()
    np.random.rand()  # the draw for aug_ratio
    annotations, expected = get_new_data(objects, before['img'], InstaBoostConfig(**how, heatmap_flag=hflag))
    seed_all()
    after = TRANSFORMS.build(STRONG | how | dict(hflag=hflag)).transform(before)
    np.testing.assert_array_equal(after['img'], expected)
    x, y, w, h = annotations[-1]['bbox']  # pasted last, so it is not covered
    assert after['gt_bboxes'].numpy()[-1] == pytest.approx((x, y, x + w, y + h), abs=1)


@needs_instaboost
def test_instaboost_removes_fully_covered_instances():
    small_next_to_large = [(0, [rectangle(98, 100, 104, 106)]), (1, [rectangle(106, 60, 170, 150)])]
    grow = STRONG | dict(dx=1000, dy=1000, theta=(0, 0), scale=(1.4, 1.5))
    after = TRANSFORMS.build(grow).transform(painted(small_next_to_large))
    assert after['gt_bboxes_labels'].tolist() == [1]
    assert_consistent(after, small_next_to_large)


@needs_instaboost
def test_instaboost_skip_changes_nothing():
    before = painted(SCENE)
    skip = STRONG | dict(action_candidate=('skip',), action_prob=(1,))
    after = TRANSFORMS.build(skip).transform(copy.deepcopy(before))
    for key in ('img', 'gt_seg_map', 'gt_bboxes_labels'):
        np.testing.assert_array_equal(after[key], before[key])
    np.testing.assert_array_equal(after['gt_masks'].to_ndarray(), before['gt_masks'].to_ndarray())
    np.testing.assert_array_equal(after['gt_bboxes'].numpy(), before['gt_bboxes'].numpy())


@needs_instaboost
@pytest.mark.parametrize(
    ('scene', 'crowd', 'ratio'),
    [([], (), 1.0), (SCENE, range(len(SCENE)), 1.0), (SCENE, (), 0.0)],
    ids=['no_instance', 'only_crowds', 'not_drawn'],
)
def test_instaboost_without_movable_instances_changes_nothing(scene, crowd, ratio):
    before = painted(scene, crowd=tuple(crowd))
    after = TRANSFORMS.build(STRONG | dict(aug_ratio=ratio, color_prob=1.0)).transform(copy.deepcopy(before))
    np.testing.assert_array_equal(after['img'], before['img'])
    np.testing.assert_array_equal(after['gt_seg_map'], before['gt_seg_map'])
    np.testing.assert_array_equal(after['gt_masks'].to_ndarray(), before['gt_masks'].to_ndarray())
    assert len(after['gt_bboxes']) == len(scene)


@needs_instaboost
def test_instaboost_does_not_move_crowds_and_empty_masks():
    tiny = (9, [rectangle(200, 210, 200, 210)])
    before = painted([*SCENE, tiny], crowd=(0,))
    assert not before['gt_masks'].to_ndarray()[-1].any()
    boxes = before['gt_bboxes'].numpy().copy()
    after = TRANSFORMS.build(STRONG).transform(copy.deepcopy(before))
    for label in (0, len(SCENE)):
        at = after['gt_bboxes_labels'].tolist().index(label)
        np.testing.assert_array_equal(after['gt_bboxes'].numpy()[at], boxes[label])
        np.testing.assert_array_equal(after['gt_masks'].masks[at], before['gt_masks'].masks[label])
    assert after['gt_ignore_flags'].sum() == 1


@needs_instaboost
def test_instaboost_without_a_semantic_map():
    before = painted(SCENE)
    seed_all()
    with_map = TRANSFORMS.build(STRONG).transform(copy.deepcopy(before))
    seed_all()
    del before['gt_seg_map']
    without = TRANSFORMS.build(STRONG).transform(before)
    assert 'gt_seg_map' not in without
    np.testing.assert_array_equal(with_map['img'], without['img'])


@needs_instaboost
def test_instaboost_colours_change_only_the_image():
    before = painted(SCENE)
    skip = STRONG | dict(action_candidate=('skip',), action_prob=(1,), color_prob=1.0)
    after = TRANSFORMS.build(skip).transform(copy.deepcopy(before))
    assert (after['img'] != before['img']).any()
    np.testing.assert_array_equal(after['gt_seg_map'], before['gt_seg_map'])


@needs_instaboost
def test_instaboost_rejects_a_pipeline_without_masks():
    before = painted(SCENE)
    del before['gt_masks']
    with pytest.raises(ValueError, match=r'no gt_masks: place it after LoadAnnotations'):
        TRANSFORMS.build(STRONG).transform(before)


@needs_instaboost
def test_instaboost_rejects_a_semantic_map_that_is_not_uint8():
    before = painted(SCENE)
    before['gt_seg_map'] = before['gt_seg_map'].astype(np.int64) + 300
    with pytest.raises(ValueError, match='only semantic maps of uint8, got int64'):
        TRANSFORMS.build(STRONG).transform(before)


def test_instaboost_names_a_missing_package_and_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, 'instaboostfast', None)  # makes the import fail
    with pytest.raises(ImportError, match=r'package instaboostfast .*pip install --no-deps instaboostfast'):
        TRANSFORMS.build(dict(type=NAME))


def real_scenes(number: int) -> list[tuple[list, int, int]]:
    """Scenes with the objects, heights and widths of COCO images, for realistic shapes and overlaps."""
    annotations = json.loads((DATA / 'annotations/instances_train2017.json').read_text())
    scenes = []
    for image in annotations['images']:
        objects = [a for a in annotations['annotations'] if a['image_id'] == image['id'] and not a['iscrowd']]
        if 1 <= len(objects) <= 12:
            scene = [(a['category_id'] - 1, a['segmentation']) for a in objects]
            scenes.append((scene, image['height'], image['width']))
    return scenes[:number]


# --- the pipeline of the configs --------------------------------------------------------------------------------------


def pipeline(instaboost: bool) -> tuple[Compose, Compose]:
    """The training pipeline of the HTC configs, at 256x256 instead of 1536x1536: up to InstaBoost, and the rest.

    It is split because InstaBoost takes most of the time: its output is reused for many draws of the rest.
    """
    steps = Config.fromfile(REPOSITORY / 'configs/_base_/datasets/coco_semantic_lsj.py').train_pipeline
    for step in steps:
        if step['type'] == 'RandomResize':
            step['scale'] = (256, 256)
        if step['type'] == 'RandomCrop':
            step['crop_size'] = (256, 256)
    kinds = [step['type'] for step in steps]
    assert {NAME, 'RandomResize', 'RandomCrop', 'RandomFlip'} <= set(kinds)
    strong = [dict(STRONG, _scope_='mmdet')] if instaboost else []
    place = kinds.index(NAME)
    return Compose([*steps[:place], *strong]), Compose(steps[place + 1 : kinds.index('PackDetInputs')])


@pytest.mark.parametrize(
    ('instaboost', 'real'),
    [
        (False, False),
        pytest.param(True, False, marks=needs_instaboost),
        pytest.param(True, True, marks=[needs_instaboost, needs_coco_mini]),
    ],
    ids=['shapes', 'moved_shapes', 'moved_coco_objects'],
)
def test_large_scale_jitter_keeps_image_masks_and_semantic_map_consistent(instaboost, real, tmp_path):
    seed_all()
    first, rest = pipeline(instaboost)
    clear, flips, scales = 0, set(), []
    for scene, *size in real_scenes(3) if real else [(SCENE, 240, 320)]:
        before = first(write_source(scene, *size, tmp_path))
        assert assert_consistent(before, scene)
        for _ in range(12):
            after = rest(copy.deepcopy(before))
            if after is None:  # nothing was left in the crop
                continue
            assert after['img'].shape[:2] == after['gt_seg_map'].shape == after['gt_masks'].masks.shape[1:]
            after['gt_bboxes'].clip_(after['img_shape'])
            clear += assert_consistent(after, scene)
            flips.add(after['flip'])
            scales.append(after['scale_factor'][0])
    assert clear > 20000
    assert flips == {False, True}
    assert min(scales) < 0.5
    assert real or max(scales) > 1


def write_source(scene: list, height: int, width: int, folder: Path) -> dict:
    """Write the files of a painted scene, and return the sample of a dataset."""
    results = painted(scene, height, width)
    cv2.imwrite(str(folder / 'image.png'), results['img'])
    cv2.imwrite(str(folder / 'map.png'), results['gt_seg_map'])
    return dict(
        img_path=str(folder / 'image.png'),
        seg_map_path=str(folder / 'map.png'),
        instances=results['instances'],
        height=height,
        width=width,
    )
