"""Which parameters of a Swin V2 are decayed, and how fast each of its layers learns."""

import re

from mmcv.cnn import is_norm
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..arguments import check_arguments
from ..registry import OPTIM_WRAPPER_CONSTRUCTORS

# beside norms and biases (Sec. A1 names none; these are the official code's)
NO_DECAY = ('logit_scale', 'cpb_mlp')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
@check_arguments()
class SwinV2OptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor, with norms, biases, `logit_scale` and `cpb_mlp` exempt from weight decay.

    The default cannot do that together with a learning rate for the backbone: its `custom_keys` override its rules for
    norms and biases. Here they give learning rates, and the exemption holds beside them:

        optim_wrapper = dict(
            constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
            paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}))

    Parameters with the same settings are one group, which optimizers update together; mmengine makes a group of each.

    Raises:
        ValueError: `paramwise_cfg` has an option that is not known, which mmengine would ignore; or the model is an
            FSDP one without `use_orig_params`, where several parameters are one.
    """

    # those of mmengine's default constructor
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
        # without an option the default would not look at parameters one by one
        super().__init__(optim_wrapper_cfg, paramwise_cfg or dict(custom_keys={}))
        unknown = {key: value for key, value in self.paramwise_cfg.items() if key not in self.options}
        if unknown:
            ways_out = [f'{key} ({_way_out(key, value)})' for key, value in unknown.items()]
            raise ValueError(f'paramwise_cfg has options {self.options}, but not {", ".join(ways_out)}')

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer of a model, or of one in a wrapper for several processes."""
        self._sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Append a group for each parameter of `module`; called by mmengine for each module in turn."""
        super().add_params(params, module, prefix=prefix, **kwargs)
        if not prefix:  # the whole model, after all of its modules
            names = {id(p): name for name, p in module.named_parameters()}
            if any(name.endswith('_flat_param') for name in names.values()):
                raise ValueError('settings for each parameter need use_orig_params=True of FSDP')
            for group in params:
                (param,) = group['params']
                self.finish_group(group, names[id(param)], module)
            exempt = sum(group.get('weight_decay') == 0 for group in params)
            total = len(params)
            params[:] = merge_groups(params)
            print_log(  # what mmengine has logged by now is without these exemptions
                f'paramwise_options -- no weight decay for {exempt} of {total} parameters: norms, biases, '
                f'{", ".join(NO_DECAY)}',
                logger='current',
            )

    def finish_group(self, group: dict, name: str, model: nn.Module) -> None:
        """Change what mmengine settled for the parameter `name` of `model`, the only one of its group."""
        if self._sharded:  # shards have one axis, whatever the parameter has
            is_flat = name.endswith('bias') or is_norm(model.get_submodule(name.rpartition('.')[0]))
        else:
            is_flat = group['params'][0].ndim <= 1
        if is_flat or any(key in name for key in NO_DECAY):
            group['weight_decay'] = 0.0


def merge_groups(groups: list[dict]) -> list[dict]:
    """Join the optimizer groups that have the same settings, in the order of their first parameters."""
    merged = {}
    for group in groups:
        settings = tuple(sorted((key, value) for key, value in group.items() if key != 'params'))
        merged.setdefault(settings, dict(group, params=[]))['params'] += group['params']
    return list(merged.values())


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
@check_arguments()
class LearningRateDecayOptimWrapperConstructor(SwinV2OptimWrapperConstructor):
    """Learning rates that fall from the head towards the input of the backbone, by the same factor with each layer.

    A parameter in layer d of n learns with lr * layer_decay_rate ** (n - 1 - d), where the backbone's `get_layer_depth`
    tells d and n. The head and all else outside the backbone are in the last layer, and learn with lr itself. The
    `custom_keys` multiply that, and the exemptions from weight decay are those of `SwinV2OptimWrapperConstructor`:

        optim_wrapper = dict(
            constructor='swinv2_mm.LearningRateDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.95))

    0.95 is the paper's for ADE20K (Sec. A1), 0.87 that of the supervised pre-training of SwinV2-G (Sec. A2.2). Name and
    option are mmpretrain's; mmdet, mmsegmentation and mmaction2 have other ones, for backbones of their own.

    Raises:
        ValueError: `layer_decay_rate` is missing, or not in (0, 1]; the optimizer has no `lr`; `paramwise_cfg` has an
            option that is not known; or the model has no backbone that knows its layers.
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
        """See `SwinV2OptimWrapperConstructor`."""
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


def _way_out(key: str, value: object) -> str:
    """Say what to write instead of an option that is not known; most are those of OpenMMLab's other constructors."""
    if key in ('layer_decay_rate', 'decay_rate'):
        return f"write layer_decay_rate={value}, and constructor='swinv2_mm.LearningRateDecayOptimWrapperConstructor'"
    if key in ('decay_type', 'num_layers'):
        return 'leave it out: rates decay with each layer, and the backbone counts them'
    if isinstance(value, dict):  # as mmaction's SwinOptimWrapperConstructor takes them
        return f'parts of names go into custom_keys={{{key!r}: {dict(value)}}}'
    return 'leave it out, or mend its name'
