"""Swin Transformer V2 backbones: one trunk for any number of axes, and what each toolbox sees of it."""

import re
from collections.abc import Sequence
from itertools import chain

import torch.fx
from torch import Tensor, nn

from ..arguments import Positive, Rate, check_arguments
from ..checkpoints.backbone import Target, check_prefix, fit_backbone, in_file
from ..openmmlab import MODELS, BaseModule
from ..ops.window_attention import check_backend
from .attention import WindowAttention
from .block import SwinBlock, SwinStage, reset_layers
from .foreign import FOREIGN_ARGUMENTS
from .log_cpb import LogCPB
from .patch import PatchEmbed
from .sizes import check_stages, per_axis, per_stage, resolve_arch

torch.fx.wrap('check_input')  # looks at the size of the input, which a symbolic trace does not know


@check_arguments(foreign=FOREIGN_ARGUMENTS)
class SwinV2(BaseModule):
    """Trunk of the Swin Transformer V2 backbones, for as many axes as the subclass says.

    Parameters are named as in the official code, so that its checkpoints need no renaming, except for the output norms
    (`norm{i}` for stage i) and the extra norms of H and G (`enorm`, which the official code lacks).

    Args:
        arch: 'tiny', 'small', 'base', 'large', 'huge', 'giant_simmim' or 'giant', or a dict with `embed_dims`,
            `depths`, `num_heads` and, if wanted, `extra_norm_every_n_blocks`.
        window_size: Tokens of a window: one number; or one number per axis, such as (8, 7, 7) for video; or one entry
            per stage, each of these forms.
        pretrained_window_sizes: Windows that the position bias was pre-trained with, in the same forms, where a number
            speaks of height and width alone: for example (12, 12, 12, 6) for the models pre-trained on ImageNet-22K.
            Needed for checkpoints that do not say so themselves; official files and those of this package do. If None,
            or 0 for an axis, the checkpoint tells, or, without one, it is the window itself.
        patch_size: Pixels of a patch, one number or one per axis.
        in_channels: Channels of the input.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        out_indices: Stages to return, each through a norm of its own. Stages after the last one are not built.
        frozen_stages: 0 freezes the patch embedding, n > 0 also the first n stages; -1 freezes nothing.
        norm_eval: Whether norms stay in eval mode during training.
        with_cp: Whether activations of each block are recomputed in the backward pass, to save memory; or the stages
            in which they are.
        mask_padding: Whether tokens that pad the map to whole windows are excluded from attention. False gives the
            convention of Swin's dense code, where they take part.
        attention_backend: Backend of `swinv2_mm.ops.window_attention`: 'auto', 'triton', 'sdpa' or 'reference'. 'auto'
            takes the first of these that can run, and 'triton' only if its kernels have been checked on this GPU.
        sequential_stages: Stages that attend in a few windows at a time, to save memory (Sec. 3.4).
        init_cfg: See `mmengine.model.BaseModule`.

    Raises:
        TypeError: An argument is unknown or of another type.
        ValueError: An argument is out of its range, or its length does not fit the number of stages or axes.
    """

    num_axes: int

    def __init__(
        self,
        arch: str | dict = 'tiny',
        window_size: int | Sequence[int | Sequence[int]] = 8,
        pretrained_window_sizes: int | Sequence[int | Sequence[int]] | None = None,
        patch_size: int | Sequence[int] = 4,
        in_channels: Positive = 3,
        drop_path_rate: Rate = 0.1,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool | Sequence[int] = False,
        mask_padding: bool = True,
        attention_backend: str = 'auto',
        sequential_stages: Sequence[int] = (),
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        arch = resolve_arch(arch)
        depths = arch['depths']
        windows = per_stage('window_size', window_size, len(depths), self.num_axes, minimum=1)
        pretrained = per_stage(
            'pretrained_window_sizes',
            0 if pretrained_window_sizes is None else pretrained_window_sizes,
            len(depths),
            self.num_axes,
            time=0,  # the public models, whose windows a single number describes, know images alone
        )
        check_stages('out_indices', out_indices, len(depths))
        check_stages('sequential_stages', sequential_stages, len(depths))
        if isinstance(with_cp, bool):
            with_cp = range(len(depths)) if with_cp else ()
        check_stages('with_cp', with_cp, len(depths))
        check_backend(attention_backend)
        if not -1 <= frozen_stages <= len(depths):
            raise ValueError(f'frozen_stages must lie between -1 and {len(depths)}, got {frozen_stages}')

        self.windows, self.told_windows = windows, pretrained
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.num_features = [arch['embed_dims'] * 2**i for i in range(len(depths))]
        self.patch_embed = PatchEmbed(
            in_channels, arch['embed_dims'], per_axis('patch_size', patch_size, self.num_axes, minimum=1)
        )
        # plain floats: a tensor's .item() would fail on the meta device
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        last = max(self.out_indices)  # stages after it would never be used
        self.layers = nn.ModuleList(
            SwinStage(
                dim,
                drop_path=rates[sum(depths[:i]) : sum(depths[: i + 1])],
                window_size=windows[i],
                extra_norm_every_n_blocks=arch['extra_norm_every_n_blocks'],
                downsample=i < last,
                with_cp=i in with_cp,
                num_heads=arch['num_heads'][i],
                pretrained_window_size=tuple(p or w for p, w in zip(pretrained[i], windows[i], strict=True)),
                mask_padding=mask_padding,
                backend=attention_backend,
                sequential=i in sequential_stages,
            )
            for i, dim in enumerate(self.num_features[: last + 1])
        )
        for i in self.out_indices:
            self.add_module(f'norm{i}', nn.LayerNorm(self.num_features[i]))
        # taken now, shapes alone: FSDP flattens parameters later, and what subclasses add is theirs to load
        self._built = {name: value.to('meta') for name, value in self.state_dict().items()}
        self._reset_parameters()
        self._freeze()

    def init_weights(self) -> None:
        """Initialise as the official code does, then load what `init_cfg` names."""
        self._reset_parameters()
        super().init_weights()

    def _reset_parameters(self) -> None:
        reset_layers(self)
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.reset_scale_and_biases()
            elif isinstance(module, LogCPB):
                module.reset_pretrained_window_size()
        for module in self.modules():
            if isinstance(module, SwinBlock):  # each block starts as the identity
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)
                    nn.init.zeros_(norm.bias)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Convert the entries under `prefix` from whatever layout they have; every road of loading comes through here.

        Raises:
            CheckpointError: They do not fit, or do not fill the backbone though they have to, see `fit_backbone`;
                nothing has been changed then.
        """
        given = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        target = Target(self._state(), self._built, self.told_windows, self.windows)
        source = local_metadata.get('source')
        with in_file(source):
            if not given:
                check_prefix(prefix, **local_metadata)
            weights = fit_backbone(
                {name.removeprefix(prefix): value for name, value in given.items()},
                target,
                from_file=source is not None,
                in_model=bool(prefix),
            )
        missing, norms = target.missing_keys(weights)
        if not missing:  # output norms that a checkpoint does not have are not what a strict load should fail for
            weights |= {name: self.get_parameter(name).detach() for name in norms}
        if not weights:
            unexpected_keys.extend(given)
        for name in given:
            del state_dict[name]
        state_dict.update({prefix + name: value for name, value in weights.items()})
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _state(self) -> dict[str, Tensor | None]:
        """What a state dict of this module holds now, whatever was replaced in it, see `checkpoints.backbone.Target`.

        Within units of FSDP it cannot be looked at: their parameters are parts, or are all flattened into one.
        """
        if not any('_fsdp_wrapped_module' in name for name, _ in self.named_modules()):
            return self.state_dict(keep_vars=True)
        present = [name for name, _ in chain(self.named_parameters(), self.named_buffers())]
        names = [re.sub(r'_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.', '', name) for name in present]
        if any(name.endswith('_flat_param') for name in names):
            names = [*self._built, *(name for name in names if not name.endswith('_flat_param'))]
        return {name: self._built.get(name) for name in names}

    def train(self, mode: bool = True) -> 'SwinV2':
        """Set the mode of all but what is frozen, or what `norm_eval` keeps in eval mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        norms = [getattr(self, f'norm{i}') for i in self.out_indices if i < self.frozen_stages]
        for module in (self.patch_embed, *self.layers[: self.frozen_stages], *norms):
            module.eval()
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, *input size) -> one (B, C_i, *S_i) for each of `out_indices`, in the order of the stages.

        Raises:
            ValueError: The input has another number of axes or channels.
        """
        # what may stand in the place of the convolution need not tell its channels
        channels = getattr(self.patch_embed.proj, 'in_channels', x.shape[1])
        check_input(x, type(self).__name__, channels, self.num_axes)
        x = self.patch_embed(x)
        outs = []
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(x).movedim(self.num_axes + 1, 1).contiguous())
            if stage.downsample is not None:
                x = stage.downsample(x)
        return tuple(outs)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Tell the layer of a parameter, for learning rates that decay from layer to layer; called as mmpretrain's.

        The patch embedding is layer 0, the first block of the network is layer 1, and so on over all stages; patch
        merging counts with the block before it. What comes after the blocks, the output norms and all that is outside
        the backbone, is the last layer. These are the layers of the official fine-tuning code (`get_swin_layer` in
        `optimizer.py` of microsoft/SimMIM).

        Args:
            param_name: Name of the parameter in the model.
            prefix: Name of the backbone in the model, with the dot that follows it.

        Returns:
            The layer, counted from 0, and the number of layers, which is that of the blocks and two more.
        """
        depths = [len(stage.blocks) for stage in self.layers]
        num_layers = sum(depths) + 2
        part, *rest = param_name.removeprefix(prefix).split('.')
        if not param_name.startswith(prefix) or part not in ('patch_embed', 'layers'):
            return num_layers - 1, num_layers
        if part == 'patch_embed':
            return 0, num_layers
        stage = int(rest[0])
        blocks = int(rest[2]) + 1 if rest[1] == 'blocks' else depths[stage]
        return sum(depths[:stage]) + blocks, num_layers


@MODELS.register_module()
class SwinTransformerV2(SwinV2):
    """Swin Transformer V2 for images: (N, C, H, W) -> a tuple of (N, C_i, H_i, W_i), for mmdet and mmsegmentation.

    Takes images of any size. The arguments are those of `SwinV2`. In a config of any toolbox:

        backbone=dict(
            type='swinv2_mm.SwinTransformerV2', arch='base', window_size=32, pretrained_window_sizes=(12, 12, 12, 6))
    """

    num_axes = 2


@MODELS.register_module()
@check_arguments(foreign=FOREIGN_ARGUMENTS)
class SwinTransformer3DV2(SwinV2):
    """Swin Transformer V2 for video: (N, C, T, H, W) -> (N, C_i, T', H_i, W_i), for mmaction2's Recognizer3D.

    Takes clips of any length and size; only height and width are merged from stage to stage. The arguments are those of
    `SwinV2`, with other defaults for `patch_size`, whose first number is the frames of a patch, and for `out_indices`.
    With several of these the result is a tuple, as that of mmaction2's SwinTransformer3D. Checkpoints of images are
    inflated when they are loaded, see `swinv2_mm.checkpoints.conversion`:

        backbone=dict(
            type='swinv2_mm.SwinTransformer3DV2', arch='tiny', window_size=(8, 7, 7),
            init_cfg=dict(type='Pretrained', checkpoint='swinv2://tiny_window8_256'))
    """

    num_axes = 3

    def __init__(
        self,
        *args,
        patch_size: int | Sequence[int] = (2, 4, 4),
        out_indices: Sequence[int] = (3,),
        **kwargs,
    ) -> None:
        super().__init__(*args, patch_size=patch_size, out_indices=out_indices, **kwargs)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(N, C, T, H, W) -> (N, C_i, T', H_i, W_i), or a tuple of them for several `out_indices`."""
        outs = super().forward(x)
        return outs[0] if len(outs) == 1 else outs


def check_input(x: Tensor, name: str, channels: int, num_axes: int) -> None:
    """Raise a ValueError unless an input has these axes and channels."""
    if x.dim() != num_axes + 2 or x.shape[1] != channels:
        axes = ('T, ' if num_axes == 3 else '') + 'H, W'
        raise ValueError(f'{name} takes an input of shape (N, {channels}, {axes}), got {tuple(x.shape)}')
