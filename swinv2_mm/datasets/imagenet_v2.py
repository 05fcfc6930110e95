"""ImageNet-V2. This module imports mmpretrain."""

from pathlib import PurePath

from mmpretrain.datasets import ImageNet


class ImageNetV2(ImageNet):
    """mmpretrain's ImageNet with the labels of ImageNet-V2, whose folders are named 0 to 999 by the index of the class.

    mmpretrain sorts the names as text, and would give folder 10 the label 2. The class is not registered, so that
    nothing else imports mmpretrain; a config gives its full path:

        dataset=dict(type='swinv2_mm.datasets.imagenet_v2.ImageNetV2', data_root=..., pipeline=...)
    """

    def load_data_list(self) -> list[dict]:
        """Find the images; `gt_label` is the number of the folder.

        Raises:
            ValueError: A folder is not named by a number.
        """
        images = super().load_data_list()
        for image in images:
            folder = PurePath(image['img_path']).parent
            if not folder.name.isdecimal():
                raise ValueError(
                    f'folder {folder} is not named by the index of a class: ImageNet-V2 has folders 0 to 999; for '
                    "folders like n01440764 use type='ImageNet'"
                )
            image['gt_label'] = int(folder.name)
        return images
