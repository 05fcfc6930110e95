"""Which parameters of a Swin V2 are decayed."""

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS

# beside norms and biases (Sec. A1 names none; these are the official code's)
NO_DECAY = ('logit_scale', 'cpb_mlp')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class SwinV2OptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor, with norms, biases, `logit_scale` and `cpb_mlp` exempt from weight decay.

    The default cannot do that together with a learning rate for the backbone: its `custom_keys` override its rules for
    norms and biases. Here they give learning rates, and the exemption holds beside them:

        optim_wrapper = dict(
            constructor='swinv2_mm.SwinV2OptimWrapperConstructor',
            paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}))
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        # without an option the default would not look at parameters one by one
        super().__init__(optim_wrapper_cfg, paramwise_cfg or dict(custom_keys={}))

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Append a group for each parameter of `module`; called by mmengine for each module in turn."""
        first = len(params)
        super().add_params(params, module, prefix=prefix, **kwargs)
        own = {id(p): f'{prefix}.{name}' for name, p in module.named_parameters(recurse=False)}
        for group in params[first:]:
            param = group['params'][0]
            name = own.get(id(param), '')  # those of children were done by their own call
            if name and (param.ndim <= 1 or any(key in name for key in NO_DECAY)):
                group['weight_decay'] = 0.0
