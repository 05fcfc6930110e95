"""Checks of mmpretrain's data sets that have a folder for each class. They list folders, but read no image."""

import os
from collections.abc import Sequence

from mmengine.config import Config

# these data sets, and the number of their classes if they have names for them
DATASETS = {'CustomDataset': None, 'ImageNet': 1000, 'ImageNet21k': None, 'ImageNetV2': 1000}
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')  # the default of mmpretrain


def has_folders(cfg: Config, dataset: dict) -> bool:
    """Whether this is the config of such a data set."""
    return cfg.get('default_scope') == 'mmpretrain' and _name(dataset) in DATASETS


def with_paths_of_split(dataset: dict) -> dict:
    """The config of such a data set with the `data_prefix` and `ann_file` that mmpretrain derives from `split`."""
    prefix, split = dataset.get('data_prefix') or '', dataset.get('split') or ''
    if not isinstance(prefix, dict):
        prefix = os.path.expanduser(prefix or split)
    ann_file = os.path.expanduser(dataset.get('ann_file') or '')
    derived = f'meta/{split}.txt'
    if split and not ann_file and os.path.exists(os.path.join(dataset.get('data_root') or '', derived)):
        ann_file = derived
    return {**dataset, 'data_prefix': prefix, 'ann_file': ann_file}


def check_folders(cfg: Config, split: str, dataset: dict, option: str) -> list[str] | None:
    """Check that such a data set has images, and not more classes than the model; not if an `ann_file` lists them.

    Of the training set, each folder needs an image: mmpretrain would log a warning, and train without that class. In
    other splits, empty folders keep the numbers of the classes equal.

    Args:
        cfg: The config.
        split: 'train', 'val' or 'test'.
        dataset: The config of the data set; its folder exists.
        option: Its option.

    Returns:
        Names of the class folders in the order of their numbers, or None if the classes are not from folders.

    Raises:
        FileNotFoundError: There is no image, or none of a class.
        ValueError: The number of folders does not fit the classes of the data set or of the model.
    """
    dataset = with_paths_of_split(dataset)
    prefix = dataset['data_prefix']
    root = os.path.join(
        dataset.get('data_root') or '', prefix.get('img_path', '') if isinstance(prefix, dict) else prefix
    )
    if dataset['ann_file'] or not os.path.isdir(root):  # mmpretrain reads other storage too
        return None
    extensions = tuple(extension.lower() for extension in dataset.get('extensions', EXTENSIONS))
    no_image = f'{split} data: no image ({", ".join(extensions)}) in'
    if dataset.get('split') == 'test' or not dataset.get('with_label', True):
        if not _has_image(root, extensions):
            raise FileNotFoundError(f'{no_image} {root} and the folders in it. Put the data there')
        return None
    folders = sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
    empty = [folder for folder in folders if not _has_image(folder, extensions)]
    if len(empty) == len(folders):
        raise FileNotFoundError(
            f'{no_image} the folders of {root}. Each class has a folder there, as in {root.rstrip("/")}/cat/1.jpg; or '
            f'list images and classes in a file: --cfg-options {option}.ann_file=PATH'
        )
    if empty and split == 'train':
        raise FileNotFoundError(
            f'{no_image} {", ".join(empty[:3])}{", ..." * (len(empty) > 3)}. Each folder of {root} is a class: put its '
            'images there, or remove the folder from all splits'
        )
    _check_number(cfg, f'{split} data: {root} has {len(folders)} folders, one for each class', dataset, option, folders)
    return [os.path.basename(folder) for folder in folders]


def check_same_classes(split: str, classes: Sequence[str], first_split: str, first_classes: Sequence[str]) -> None:
    """Check that two splits have the same class folders: mmpretrain numbers those of each split on their own.

    Raises:
        ValueError: They differ.
    """
    if classes != first_classes:
        differ = sorted(set(classes) ^ set(first_classes))
        raise ValueError(
            f'{split} data: its class folders are not those of {first_split}: only one of them has '
            f'{", ".join(differ[:3])}{", ..." * (len(differ) > 3)}. Classes are numbered in their order, so '
            'both splits need the same folders, even if some are empty'
        )


def _check_number(cfg: Config, found: str, dataset: dict, option: str, folders: Sequence[str]) -> None:
    names = dataset.get('classes') or (dataset.get('metainfo') or {}).get('classes')
    named = len(names) if isinstance(names, (list, tuple)) else DATASETS[_name(dataset)]
    if named is not None and named != len(folders):
        raise ValueError(f'{found}, but {option} has {named} classes: name yours in {option}.metainfo.classes')
    num_classes = (cfg.model.get('head') or {}).get('num_classes')
    if num_classes and num_classes < len(folders):
        options = [f'model.head.num_classes={len(folders)}']
        if 'num_classes' in (cfg.model.get('data_preprocessor') or {}):  # for Mixup and CutMix
            options.append(
                f'{"" if "data_preprocessor" in cfg else "model."}data_preprocessor.num_classes={len(folders)}'
            )
        raise ValueError(f'{found}, but model.head.num_classes={num_classes}: --cfg-options {" ".join(options)}')


def _has_image(folder: str, extensions: tuple[str, ...]) -> bool:
    """Whether there is an image in a folder or below it; stops at the first one."""
    with os.scandir(folder) as entries:
        return any(
            entry.name.lower().endswith(extensions) and not entry.name.startswith('.')
            if entry.is_file()
            else entry.is_dir() and _has_image(entry.path, extensions)
            for entry in entries
        )


def _name(dataset: dict) -> str:
    return str(dataset.get('type')).split('.')[-1]
