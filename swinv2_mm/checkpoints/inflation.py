"""From the weights of an image model to those of a video model that sees a still clip as the image itself.

The paper does not say how. This is the rule of Video Swin (arXiv 2106.13230, `inflate_weights` in its code) in terms
of Log-CPB: the patch embedding is divided among the frames of a patch, and the position bias does not depend on time.
"""

import torch
import torch.nn.functional as F

from ..openmmlab import print_log
from .layouts import PATCH, Weights
from .windows import Windows, stored_entries, window_entries


def is_for_images(weights: Weights) -> bool:
    """Whether weights under our names embed patches of two axes."""
    return PATCH in weights and weights[PATCH].dim() == 4


def inflate(weights: Weights, patch_frames: int, told: Windows, windows: Windows) -> Weights:
    """Turn the weights of an image model, under our names, into those of a video model.

    The MLP of the position bias gets a column of zeros for time, before those of height and width; it learns from there
    on. The pre-training window of height and width stays, that of time is the config's or else the model's own.

    Args:
        weights: Weights with patches of two axes.
        patch_frames: Frames of a patch.
        told: `pretrained_window_sizes` of the config, 0 for not told.
        windows: Windows of the video model.
    """
    inflated = dict(weights)
    for name, value in weights.items():
        if value.layout is not torch.strided:
            continue  # refused, with what else does not fit, by those that follow
        if name == PATCH:
            inflated[name] = (value.unsqueeze(2).repeat(1, 1, patch_frames, 1, 1) / patch_frames).to(value.dtype)
        elif name.endswith('cpb_mlp.0.weight') and value.dim() == 2:
            inflated[name] = F.pad(value, (1, 0))
    spatial = stored_entries(weights)
    settled = [
        (of_config[0] or window[0], *spatial.get(stage, (0, 0)))
        for stage, (of_config, window) in enumerate(zip(told, windows, strict=True))
    ]
    print_log(
        f'SwinV2: inflated from images to video with {patch_frames} frames a patch; the position bias does not depend '
        f'on time yet, whose coordinates are scaled by windows of {", ".join(str(time) for time, *_ in settled)}',
        logger='current',
    )
    stages = tuple(f'layers.{stage}.' for stage in range(len(windows)))  # those of a deeper model are refused later
    return inflated | window_entries(settled, [name for name in inflated if name.startswith(stages)])
