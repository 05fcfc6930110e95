"""The backbone of SimMIM, self-supervised pre-training by predicting masked patches (arXiv 2111.09886)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..arguments import check_arguments
from ..openmmlab import MODELS
from .foreign import FOREIGN_ARGUMENTS
from .swin_v2 import SwinTransformerV2


@MODELS.register_module()
@check_arguments(foreign=FOREIGN_ARGUMENTS)
class SimMIMSwinTransformerV2(SwinTransformerV2):
    """Swin Transformer V2 with a mask token in place of masked patches, for mmpretrain's SimMIM.

    The arguments are those of `SwinV2`; `out_indices` is (3,) by default, the stage that is decoded. Its checkpoints
    load into `SwinTransformerV2`, and those of `SwinTransformerV2` into it, where the mask token stays as it is:

        model = dict(
            type='SimMIM',
            backbone=dict(type='swinv2_mm.SimMIMSwinTransformerV2', arch='base', window_size=12),
            neck=dict(type='SimMIMLinearDecoder', in_channels=1024, encoder_stride=32),
            head=dict(
                type='SimMIMHead', patch_size=4, loss=dict(type='PixelReconstructionLoss', criterion='L1', channel=3)))
    """

    def __init__(self, *args, out_indices: Sequence[int] = (3,), **kwargs) -> None:
        super().__init__(*args, out_indices=out_indices, **kwargs)
        if len(self.out_indices) != 1:
            raise ValueError(f'SimMIM decodes one stage, but out_indices={self.out_indices}: give the last stage only')
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.num_features[0]))
        self._reset_mask_token()

    def init_weights(self) -> None:
        """See `SwinV2`."""
        self._reset_mask_token()
        super().init_weights()

    def _reset_mask_token(self) -> None:
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Replace masked patches by the mask token, then continue as `SwinTransformerV2` does.

        Args:
            x: (B, C, H, W).
            mask: (B, H / 4, W / 4) for patches of 4 pixels, 1 for masked patches and 0 for others; None masks nothing.

        Returns:
            (B, C_i, H_i, W_i) for each of `out_indices`.

        Raises:
            ValueError: The input has another number of channels, or the mask another shape.
        """
        tokens = self.embed(x)
        if mask is not None:
            check_mask(mask, tokens.shape[:-1])
            tokens = torch.where(mask.bool().unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        return self.run_stages(tokens)


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Raise a ValueError unless the mask has this shape, one entry per patch."""
    if mask.shape != shape:
        raise ValueError(
            f'the mask of SimMIM needs one entry per patch, shape {tuple(shape)}, got {tuple(mask.shape)}: set '
            "input_size and model_patch_size of SimMIMMaskGenerator to the image size and the backbone's patch_size"
        )
