"""Swin Transformer V2 backbones for images and video, with a common base class for any number of axes."""

import re
from collections.abc import Sequence
from itertools import chain

import torch.fx
from torch import Tensor, nn

from ..arguments import Positive, Rate, check_arguments
from ..checkpoints.backbone import Target, check_prefix, fit_backbone, in_file
from ..checkpoints.layouts import CLASSIFIER_PREFIX
from ..openmmlab import MODELS, BaseModule
from ..ops.window_attention import check_backend
from .attention import WindowAttention
from .block import SwinBlock, SwinStage, reset_layers
from .foreign import FOREIGN_ARGUMENTS
from .log_cpb import LogCPB
from .patch import PatchEmbed
from .sizes import check_stages, per_axis, per_stage, resolve_arch

torch.fx.wrap('check_input')  # leaf function of torch.fx: it depends on the input size


@check_arguments(foreign=FOREIGN_ARGUMENTS)
class SwinV2(BaseModule):
    """Base class of the Swin Transformer V2 backbones; `num_axes` is set by the subclass.

    Parameters are named as in the official code, so that its checkpoints need no renaming, except for the output norms
    (`norm{i}` for stage i) and the extra norms of H and G (`enorm`, which the official code lacks).

    Args:
        arch: 'tiny', 'small', 'base', 'large', 'huge', 'giant_simmim' or 'giant', or a dict with `embed_dims`,
            `depths`, `num_heads` and, if wanted, `extra_norm_every_n_blocks`.
        window_size: Tokens of a window along each axis: one number for all axes; one number per axis, such as (8, 7, 7)
            for video; or a list with one of these per stage.
        pretrained_window_sizes: Window sizes that the position bias was pre-trained with, in the same forms, except
            that a single number means height and width only: for example (12, 12, 12, 6) for the models pre-trained on
            ImageNet-22K. Needed for checkpoints that do not store them; official files and those of this package do.
            None, or 0 for an axis, takes the value of the checkpoint, or the window size if none is loaded.
        patch_size: Pixels (and frames) of a patch: one number, or one per axis.
        in_channels: Channels of the input.
        drop_path_rate: Drop-path rate of the last block; rates grow linearly from 0 at the first.
        out_indices: Stages whose feature maps are returned, each after its own norm. Later stages are not built.
        frozen_stages: 0 freezes the patch embedding, n > 0 also the first n stages; -1 freezes nothing.
        norm_eval: Whether norms stay in eval mode during training.
        with_cp: Whether to recompute the activations of each block in the backward pass, to save memory (gradient
            checkpointing); or a list of the stages where to do so.
        mask_padding: Whether tokens that pad the feature map to whole windows are masked. False gives the convention
            of Swin's dense code, where they take part in attention.
        attention_backend: Backend of `swinv2_mm.ops.window_attention`: 'auto', 'triton', 'sdpa' or 'reference'. 'auto'
            takes the first of these that can run, and 'triton' only if its kernels pass a check on this GPU.
        sequential_stages: Stages that compute attention a few windows at a time, to save memory (Sec. 3.4).
        init_cfg: See `mmengine.model.BaseModule`.

    Raises:
        TypeError: An argument is unknown or of another type.
        ValueError: An argument is out of range, or its length does not match the number of stages or axes.
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
            time=0,  # a single number is the window of an image checkpoint, which has no time axis
        )
        check_stages('out_indices', out_indices, len(depths))
        check_stages('sequential_stages', sequential_stages, len(depths))
        if isinstance(with_cp, bool):
            with_cp = range(len(depths)) if with_cp else ()
        check_stages('with_cp', with_cp, len(depths))
        check_backend(attention_backend)
        if not -1 <= frozen_stages <= len(depths):
            raise ValueError(f'frozen_stages must lie between -1 and {len(depths)}, got {frozen_stages}')

        self.windows, self.cfg_windows = windows, pretrained
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.num_features = [arch['embed_dims'] * 2**i for i in range(len(depths))]
        self.patch_embed = PatchEmbed(
            in_channels, arch['embed_dims'], per_axis('patch_size', patch_size, self.num_axes, minimum=1)
        )
        # Python floats: .item() of a tensor would fail on the meta device
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        last = max(self.out_indices)  # later stages would never be used
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
        # names and shapes as built: FSDP flattens parameters later, and subclasses load what they add themselves
        self._built = {name: value.to('meta') for name, value in self.state_dict().items()}
        self._reset_parameters()
        self._freeze()

    def init_weights(self) -> None:
        """Initialise as in the official code, then as `init_cfg` says, such as from a checkpoint."""
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
        """Convert the entries under `prefix` from any public layout, then load them.

        All loading paths (`init_cfg`, `load_from`, resuming, `init_detector`) call this method.

        Raises:
            CheckpointError: The entries do not match the backbone, or are incomplete where they must not be, see
                `fit_backbone`. The backbone is then unchanged.
        """
        entries = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        target = Target(self._state(), self._built, self.cfg_windows, self.windows)
        source = local_metadata.get('source')
        with in_file(source):
            if not entries:
                check_prefix(prefix, **local_metadata)
            weights = fit_backbone(
                {name.removeprefix(prefix): value for name, value in entries.items()},
                target,
                from_file=source is not None,
                in_model=bool(prefix),
            )
        missing, norms = target.missing_keys(weights)
        if not missing:  # a strict load must not fail only because a checkpoint has no output norms
            weights |= {name: self.get_parameter(name).detach() for name in norms}
        if not weights:
            unexpected_keys.extend(entries)
        for name in entries:
            del state_dict[name]
        state_dict.update({prefix + name: value for name, value in weights.items()})
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @staticmethod
    def _checkpoint_filter(state_dict: dict[str, Tensor], prefix: str, *_) -> None:
        """Move the classifier of a released file from the backbone to the head of mmpretrain's ImageClassifier.

        ImageClassifier registers this function as its own loading hook, because the backbone has it.
        """
        classifier = prefix + 'backbone.' + CLASSIFIER_PREFIX
        for name in [name for name in state_dict if name.startswith(classifier)]:
            state_dict[prefix + CLASSIFIER_PREFIX + name.removeprefix(classifier)] = state_dict.pop(name)

    def _state(self) -> dict[str, Tensor | None]:
        """Current state dict, including modules that were replaced, see `checkpoints.backbone.Target`.

        With FSDP, parameters are sharded or flattened into one, so their shapes are those at construction.
        """
        if not any('_fsdp_wrapped_module' in name for name, _ in self.named_modules()):
            return self.state_dict(keep_vars=True)
        present = [name for name, _ in chain(self.named_parameters(), self.named_buffers())]
        names = [re.sub(r'_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.', '', name) for name in present]
        if any(name.endswith('_flat_param') for name in names):
            names = [*self._built, *(name for name in names if not name.endswith('_flat_param'))]
        return {name: self._built.get(name) for name in names}

    def train(self, mode: bool = True) -> 'SwinV2':
        """Set the mode, except for frozen modules and, with `norm_eval`, norms, which stay in eval mode."""
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
        return self.run_stages(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, *input size) -> (B, *S, embed_dims), the tokens of the first stage; raises as `forward` does."""
        # a module that replaced the convolution need not have `in_channels`
        channels = getattr(self.patch_embed.proj, 'in_channels', x.shape[1])
        check_input(x, type(self).__name__, channels, self.num_axes)
        return self.patch_embed(x)

    def run_stages(self, x: Tensor) -> tuple[Tensor, ...]:
        """Tokens of the first stage -> what `forward` returns."""
        outs = []
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(x).movedim(self.num_axes + 1, 1).contiguous())
            if stage.downsample is not None:
                x = stage.downsample(x)
        return tuple(outs)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages by depth; each takes and returns the main branch, (B, *S, C)."""
        return [block for stage in self.layers for block in stage.blocks]

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Layer index of a parameter, for layer-wise learning-rate decay; same interface as in mmpretrain.

        The patch embedding and SimMIM's mask token are layer 0, the first block of the network is layer 1, and so on
        over all stages; patch merging belongs to the layer of the block before it. Output norms, and parameters outside
        the backbone, are the last layer. This is the numbering of the official fine-tuning code (`get_swin_layer` in
        `optimizer.py` of microsoft/SimMIM).

        Args:
            param_name: Name of the parameter in the model.
            prefix: Name of the backbone in the model, with a trailing dot.

        Returns:
            The layer, counted from 0, and the number of layers, which is the number of blocks + 2.
        """
        depths = [len(stage.blocks) for stage in self.layers]
        num_layers = sum(depths) + 2
        part, *rest = param_name.removeprefix(prefix).split('.')
        if not param_name.startswith(prefix) or part not in ('patch_embed', 'mask_token', 'layers'):
            return num_layers - 1, num_layers
        if part != 'layers':
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
    Several `out_indices` give a tuple, as in mmaction2's SwinTransformer3D. Image checkpoints are inflated when they
    are loaded, see `swinv2_mm.checkpoints.conversion`:

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
    """Raise a ValueError unless the input has this number of axes and channels."""
    if x.dim() != num_axes + 2 or x.shape[1] != channels:
        axes = ('T, ' if num_axes == 3 else '') + 'H, W'
        raise ValueError(f'{name} takes an input of shape (N, {channels}, {axes}), got {tuple(x.shape)}')
