import hashlib
from collections import Counter

import cv2
import numpy as np
import pytest
from matplotlib.path import Path as Outline
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from tool_runs import TOOLS, load_tool, run

MAKER = 'misc/make_shapes_coco.py'
TRAIN, VAL, SIZE = 90, 30, 64


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOLS / MAKER)


@pytest.fixture(scope='module')
def data(tool, tmp_path_factory):
    out = tmp_path_factory.mktemp('shapes') / 'shapes_coco'
    tool.main([str(out), '--train', str(TRAIN), '--val', str(VAL), '--size', str(SIZE), '--seed', '3'])
    return out


def splits(data):
    return {split: COCO(data / 'annotations' / f'instances_{split}2017.json') for split in ('train', 'val')}


def read(data, folder, info, suffix='.jpg'):
    image = cv2.imread(str((data / folder / info['file_name']).with_suffix(suffix)), cv2.IMREAD_UNCHANGED)
    assert image is not None, info['file_name']
    assert image.shape[:2] == (info['height'], info['width']) == (SIZE, SIZE)
    return image


def hashes(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*.*'))}


def independent_instances(shapes, size):
    """Paints back to front, pixel centre by pixel centre, with matplotlib's point-in-polygon and Euclid's disc."""
    centres = np.array([(x + 0.5, y + 0.5) for y in range(size) for x in range(size)])
    instances = np.zeros(size * size, int)
    for index, shape in enumerate(shapes, 1):
        if shape.kind == 'disc':
            inside = np.hypot(*(centres - shape.centre).T) <= shape.radius
        else:
            n = {'square': 4, 'triangle': 3}[shape.kind]
            corners = [
                (
                    shape.centre[0] + shape.radius * np.cos(shape.angle + 2 * np.pi * k / n),
                    shape.centre[1] + shape.radius * np.sin(shape.angle + 2 * np.pi * k / n),
                )
                for k in range(n)
            ]
            inside = Outline(corners).contains_points(centres)
        instances[inside] = index
    return instances.reshape(size, size)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_annotations_are_those_of_the_scene(tool, data, split):
    coco = splits(data)[split]
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(tool.THINGS)
    for number, image_id in enumerate(coco.getImgIds()):
        info, annotations = coco.imgs[image_id], coco.imgToAnns[image_id]
        scene = tool.make_scene(np.random.default_rng((3, int(split == 'val'), number)), SIZE)
        drawn = independent_instances(scene.shapes, SIZE)
        stuff = read(data, f'stuffthingmaps/{split}2017', info, '.png')
        assert np.abs(read(data, f'{split}2017', info).astype(float) - scene.image).mean() < 8  # JPEG
        assert len(annotations) == len(scene.shapes)
        for index, (annotation, shape) in enumerate(zip(annotations, scene.shapes, strict=True), 1):
            mask = coco.annToMask(annotation).astype(bool)
            assert np.array_equal(mask, drawn == index)
            assert annotation['area'] == mask.sum() == mask_utils.area(coco.annToRLE(annotation))
            assert annotation['bbox'] == mask_utils.toBbox(coco.annToRLE(annotation)).tolist()
            assert tool.THINGS[annotation['category_id'] - 1] == shape.kind
            assert np.all(stuff[mask] == annotation['category_id'] - 1)
        assert set(np.unique(stuff[drawn == 0])) <= set(tool.STUFF.values())
        names = [*tool.THINGS, *tool.STUFF]
        for label, value in enumerate([0, 1, 2, 123, 153, 154, 156]):
            labels = read(data, f'labels/{split}2017', info, '.png')
            assert np.array_equal(labels == label, stuff == value), names[label]


def test_mask_has_the_colour_of_its_object(tool, data):
    coco = splits(data)['val']
    for image_id, info in coco.imgs.items():
        image = read(data, 'val2017', info).astype(float)
        for annotation in coco.imgToAnns[image_id]:
            inner = cv2.erode(coco.annToMask(annotation), np.ones((5, 5), np.uint8))  # JPEG blurs the edges
            pixels = image[inner > 0]
            assert len(pixels)
            far = np.abs(pixels - np.median(pixels, axis=0)).max(axis=1) > 40  # one colour with little noise
            assert far.mean() < 0.01


def test_masks_of_occluded_objects(tool, data):
    occluded = 0
    for number in range(VAL):
        scene = tool.make_scene(np.random.default_rng((3, 1, number)), SIZE)
        x, y = tool.pixel_centres(SIZE)
        for index, shape in enumerate(scene.shapes, 1):
            share = (scene.instances == index).sum() / shape.covers(x, y).sum()
            assert tool.MIN_VISIBLE <= share <= 1
            occluded += share < 1
    assert occluded >= VAL // 5


def test_shapes_classes_are_balanced(tool, data):
    for split, coco in splits(data).items():
        counts = Counter(a['category_id'] for a in coco.anns.values())
        share = np.array([counts[i] for i in (1, 2, 3)]) / sum(counts.values())
        assert np.all(np.abs(share - 1 / 3) < 0.12), (split, share)
        values = Counter()
        for info in coco.imgs.values():
            values.update(np.unique(read(data, f'stuffthingmaps/{split}2017', info, '.png')).tolist())
        assert values[tool.STUFF['sky-other']] == len(coco.imgs)
        assert all(values[tool.STUFF[name]] >= len(coco.imgs) // 3 for name in ('grass', 'sand', 'sea'))


def test_training_and_validation_share_nothing(data):
    train, val = splits(data).values()
    assert len(train.imgs) == TRAIN
    assert len(val.imgs) == VAL
    assert not set(train.imgs) & set(val.imgs)
    assert not set(train.anns) & set(val.anns)
    assert min(train.anns) > 0
    contents = [hashes(data / f'{split}2017').values() for split in ('train', 'val')]
    assert len(set().union(*contents)) == TRAIN + VAL


def test_same_arguments_give_same_bytes_and_another_seed_other_images(tool, data, tmp_path):
    arguments = ['--train', str(TRAIN), '--val', str(VAL), '--size', str(SIZE)]
    output = run(tmp_path, MAKER, 'again', *arguments, '--seed', 3)  # as users start it
    assert f'again: images of {SIZE} x {SIZE} pixels' in output
    assert hashes(tmp_path / 'again') == hashes(data)
    tool.main([str(tmp_path / 'again'), '--train', '3', '--val', '2', '--size', str(SIZE), '--seed', '4'])
    replaced = hashes(tmp_path / 'again')
    assert len(replaced) == 3 * (3 + 2) + 2
    assert not set(replaced.values()) & set(hashes(data).values())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--train', '0'], '--train is 0, give at least 1'),
        (['--val', '-2'], '--val is -2, give at least 1'),
        (['--size', '16'], '--size is 16, give at least 32'),
        (['--seed', '-1'], '--seed is -1, give at least 0'),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tool, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / 'out'), *arguments])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_folders_are_not_overwritten(tool, tmp_path, capsys):
    (tmp_path / 'precious.txt').write_text('mine')
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path), '--train', '1', '--val', '1'])
    assert 'delete it or choose another folder' in capsys.readouterr().err
    assert (tmp_path / 'precious.txt').read_text() == 'mine'
