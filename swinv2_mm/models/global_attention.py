"""The layer of global self-attention that HTC++ appends to the last stage of the backbone."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import Positive, Rate, check_arguments
from ..openmmlab import MODELS, BaseModule, DropPath
from .block import Mlp, reset_layers


@MODELS.register_module()
@check_arguments()
class GlobalAttention(BaseModule):
    """One transformer layer over all positions of the last feature map, placed before the neck.

        neck=[dict(type='swinv2_mm.GlobalAttention', in_channels=1024, num_heads=32), dict(type='FPN', ...)]

    HTC++ has "an extra global self-attention layer appended at the output of last stage" (Swin V1, Sec. 4.2 and A2.2),
    with no further details published. As in public reimplementations, it is a pre-norm layer with a final norm and no
    position bias. The last linear layer of both residual branches is initialised to zero, so that at the start the
    layer passes the last feature map, which is normalised already, on unchanged.

    Args:
        in_channels: Channels of the last feature map.
        num_heads: Attention heads; must divide `in_channels`. The backbone has one per 32 channels.
        drop_path_rate: Probability of dropping a residual branch for a sample.
        init_cfg: See `mmengine.model.BaseModule`.

    Raises:
        TypeError: An argument is unknown or of another type.
        ValueError: `num_heads` does not divide `in_channels`, or `drop_path_rate` is out of range.
    """

    def __init__(
        self,
        in_channels: Positive,
        num_heads: int,
        drop_path_rate: Rate = 0.0,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if num_heads < 1 or in_channels % num_heads:
            raise ValueError(f'num_heads must divide in_channels, got {num_heads} for {in_channels} channels')
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(in_channels)
        self.qkv = nn.Linear(in_channels, 3 * in_channels)
        self.proj = nn.Linear(in_channels, in_channels)
        self.norm2 = nn.LayerNorm(in_channels)
        self.mlp = Mlp(in_channels)
        self.norm = nn.LayerNorm(in_channels)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self._reset_parameters()

    def init_weights(self) -> None:
        """Initialise with both residual branches at zero, then as `init_cfg` says."""
        self._reset_parameters()
        super().init_weights()

    def _reset_parameters(self) -> None:
        reset_layers(self)
        for last in (self.proj, self.mlp.fc2):
            nn.init.zeros_(last.weight)

    def forward(self, feats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Feature maps (N, C_i, H_i, W_i) of each stage -> the same shapes; only the last one changes.

        Raises:
            ValueError: The last feature map has another number of axes or channels.
        """
        *others, last = feats
        channels = self.proj.in_features
        if last.dim() != 4 or last.shape[1] != channels:
            raise ValueError(
                f'GlobalAttention was built with in_channels={channels} and takes a last feature map of shape '
                f'(N, {channels}, H, W), got {tuple(last.shape)}'
            )
        x = last.flatten(2).transpose(1, 2)  # (N, HW, C)
        x = x + self.drop_path(self._attention(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return (*others, self.norm(x).transpose(1, 2).reshape(last.shape))

    def _attention(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, C); fused kernels of SDPA never hold the (L, L) matrix."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
