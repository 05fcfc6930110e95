"""Pooling and classifier of the official code, for mmpretrain's ImageClassifier.

This module imports mmpretrain, so a config gives full paths: `swinv2_mm.models.classification.SwinV2ClsHead`.
"""

import torch
from mmpretrain.models import GlobalAveragePooling, LinearClsHead
from torch import Tensor

from ..arguments import check_arguments
from ..checkpoints import CheckpointError
from ..checkpoints.backbone import in_file
from ..registry import MODELS


@MODELS.register_module()
@check_arguments()
class TokenAveragePooling(GlobalAveragePooling):
    """mmpretrain's GlobalAveragePooling with the sum over all tokens in the order of the official code.

    So logits equal those of the official code to the last bit.
    """

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Feature maps (N, C_i, H_i, W_i) -> averages (N, C_i)."""
        return super().forward(tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs))


@MODELS.register_module()
@check_arguments()
class SwinV2ClsHead(LinearClsHead):
    """mmpretrain's LinearClsHead with the official initialisation; it raises if the number of classes differs.

    For a checkpoint with other classes mmengine would log a line, and keep random weights.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the last stage.
        init_cfg: See `mmengine.model.BaseModule`.
        kwargs: Those of `LinearClsHead`: `loss`, `topk`, `cal_acc`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        init_cfg: dict | None = dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),  # noqa: B006 never changed
        **kwargs,
    ) -> None:
        super().__init__(num_classes, in_channels, init_cfg=init_cfg, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict, *args) -> None:
        """Check the number of classes, then load.

        Raises:
            CheckpointError: The checkpoint has another number of classes.
        """
        weight = state_dict.get(f'{prefix}fc.weight')
        if weight is not None and len(weight) != self.num_classes:
            with in_file(local_metadata.get('source')):
                raise CheckpointError(
                    f'it classifies into {len(weight)} classes, and the model has num_classes={self.num_classes}. Set '
                    'model.head.num_classes to that of the checkpoint, or train with a fresh head: load only the '
                    'backbone, by model.backbone.init_cfg=dict(type="Pretrained", checkpoint=...) instead of load_from'
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
