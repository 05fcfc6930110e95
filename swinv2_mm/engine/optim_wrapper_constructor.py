"""Optimizer wrapper constructors for Swin V2: weight decay exemptions and layer-wise learning-rate decay."""

import re

from mmcv.cnn import is_norm
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..arguments import check_arguments
from ..registry import OPTIM_WRAPPER_CONSTRUCTORS

# in addition to norms and biases; from the official code, because Sec. A1 lists no exemptions
NO_DECAY = ('logit_scale', 'cpb_mlp', 'mask_token')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
@check_arguments()
class SwinV2OptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor without weight decay for norms, biases and the parameters of `NO_DECAY`.

    The default constructor cannot combine that with a learning rate for the backbone, because `custom_keys` override
    its rules for norms and biases. Here, the exemptions apply in addition to `custom_keys`:

        optim_wrapper = dict(
            constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
            paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}))

    Parameters with the same settings are merged into one group, for multi-tensor optimizers; mmengine creates one group
    per parameter.

    Raises:
        ValueError: `paramwise_cfg` has an unknown option, which mmengine would ignore; or the model is wrapped by FSDP
            without `use_orig_params`, which flattens parameters.
    """

    # of mmengine's default constructor
    options: tuple[str, ...] = (
        'custom_keys',
        'bias_lr_mult',
        'bias_decay_mult',
        'norm_decay_mult',
        'flat_decay_mult',
        'dwconv_decay_mult',
        'dcn_offset_lr_mult',
        'bypass_duplicate',
    )

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        # without options, the default constructor would not call add_params
        super().__init__(optim_wrapper_cfg, paramwise_cfg or dict(custom_keys={}))
        unknown = {key: value for key, value in self.paramwise_cfg.items() if key not in self.options}
        if unknown:
            hints = [f'{key} ({_hint(key, value)})' for key, value in unknown.items()]
            raise ValueError(f'paramwise_cfg has options {self.options}, but not {", ".join(hints)}')

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of a model, which may be wrapped for distributed training."""
        self._is_fsdp = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Append a group for each parameter of `module`; called by mmengine recursively."""
        super().add_params(params, module, prefix=prefix, **kwargs)
        if not prefix:  # back at the model, after all of its submodules
            names = {id(p): name for name, p in module.named_parameters()}
            if any(name.endswith('_flat_param') for name in names.values()):
                raise ValueError('parameter-wise settings need use_orig_params=True of FSDP')
            for group in params:
                (param,) = group['params']
                self.finish_group(group, names[id(param)], module)
            exempt = sum(group.get('weight_decay') == 0 for group in params)
            total = len(params)
            params[:] = merge_groups(params)
            print_log(  # mmengine has already logged its settings, without these exemptions
                f'paramwise_options -- no weight decay for {exempt} of {total} parameters: norms, biases, '
                f'{", ".join(NO_DECAY)}',
                logger='current',
            )

    def finish_group(self, group: dict, name: str, model: nn.Module) -> None:
        """Adjust the settings of the group that mmengine created for the parameter `name` of `model`."""
        if self._is_fsdp:  # shards are 1-D, whatever the shape of the parameter
            is_norm_or_bias = name.endswith('bias') or is_norm(model.get_submodule(name.rpartition('.')[0]))
        else:
            is_norm_or_bias = group['params'][0].ndim <= 1
        if is_norm_or_bias or any(key in name for key in NO_DECAY):
            group['weight_decay'] = 0.0


def merge_groups(groups: list[dict]) -> list[dict]:
    """Merge optimizer groups with equal settings, in the order of their first parameters."""
    merged = {}
    for group in groups:
        settings = tuple(sorted((key, value) for key, value in group.items() if key != 'params'))
        merged.setdefault(settings, dict(group, params=[]))['params'] += group['params']
    return list(merged.values())


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
@check_arguments()
class LearningRateDecayOptimWrapperConstructor(SwinV2OptimWrapperConstructor):
    """Layer-wise learning-rate decay from the head to the input of the backbone.

    The learning rate in layer d of n is lr * layer_decay_rate ** (n - 1 - d), where d and n are returned by the
    backbone's `get_layer_depth`. Parameters outside the backbone are in the last layer, with learning rate lr.
    `custom_keys` multiply it, and the same parameters are exempt from weight decay as in
    `SwinV2OptimWrapperConstructor`:

        optim_wrapper = dict(
            constructor='swinv2_mm.LearningRateDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.95))

    The paper uses 0.95 on ADE20K (Sec. A1) and 0.87 in the supervised pre-training of SwinV2-G (Sec. A2.2). Class name
    and option are those of mmpretrain; the constructors of mmdet, mmsegmentation and mmaction2 support other backbones.

    Raises:
        ValueError: `layer_decay_rate` is missing, or not in (0, 1]; the optimizer has no `lr`; `paramwise_cfg` has an
            unknown option; or the backbone has no `get_layer_depth`.
    """

    options = ('layer_decay_rate', *SwinV2OptimWrapperConstructor.options)

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(
                f'layer_decay_rate of paramwise_cfg must be a number above 0 and up to 1, such as 0.95, got {rate!r}'
            )
        if self.base_lr is None:
            raise ValueError(
                f'layer_decay_rate needs a learning rate to start from: set lr of the optimizer {self.optimizer_cfg}'
            )

    def finish_group(self, group: dict, name: str, model: nn.Module) -> None:
        """Multiply the learning rate by that of the layer; see `SwinV2OptimWrapperConstructor`."""
        super().finish_group(group, name, model)
        backbone = getattr(model, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise ValueError(
                f'layer_decay_rate needs a backbone with the method get_layer_depth(name, prefix), but '
                f'{type(model).__name__}.backbone is of type {type(backbone).__name__}: use a backbone of swinv2_mm, '
                "or, without layer-wise rates, constructor='swinv2_mm.SwinV2OptimWrapperConstructor'"
            )
        name = re.sub(r'_(fsdp|checkpoint)_wrapped_module\.', '', name)
        depth, num_layers = backbone.get_layer_depth(name, 'backbone.')
        scale = self.paramwise_cfg['layer_decay_rate'] ** (num_layers - 1 - depth)
        group['lr'] = group.get('lr', self.base_lr) * scale
        print_log(f'paramwise_options -- {name}:lr={group["lr"]} (layer {depth} of {num_layers})', logger='current')


def _hint(key: str, value: object) -> str:
    """What to write instead of an unknown option; most are options of OpenMMLab's other constructors."""
    if key in ('layer_decay_rate', 'decay_rate'):
        return f"write layer_decay_rate={value}, and constructor='swinv2_mm.LearningRateDecayOptimWrapperConstructor'"
    if key in ('decay_type', 'num_layers'):
        return 'leave it out: rates decay with each layer, and the backbone counts them'
    if isinstance(value, dict):  # the form of mmaction's SwinOptimWrapperConstructor
        return f'parts of parameter names go into custom_keys={{{key!r}: {dict(value)}}}'
    return 'leave it out, or correct its name'
