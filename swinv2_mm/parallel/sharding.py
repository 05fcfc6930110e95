"""Training whose optimizer states, or parameters too, lie in parts on several processes, in mmengine's Runner.

`configs/_base_/memory/zero1.py` and `fsdp.py` choose it by the keys `runner_type` and `model_wrapper_cfg` alone, so any
config can add it. Checkpoints are those of an ordinary training.
"""

import contextlib
from collections.abc import Iterator

import torch
from mmengine.device import get_device
from mmengine.dist import broadcast, get_world_size, is_main_process
from mmengine.hooks import EMAHook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIMIZERS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer

from ..arguments import check_arguments
from ..compat import torch_release
from ..models.block import SwinBlock
from ..registry import MODEL_WRAPPERS, RUNNERS


@MODEL_WRAPPERS.register_module()
@check_arguments()
class ZeroDistributedDataParallel(MMDistributedDataParallel):
    """DistributedDataParallel for optimizer states that are split among the processes (ZeRO-1, Sec. 3.4).

    Each process keeps and computes the states of its share of the parameters, and sends these to the others. Which
    optimizer that is, the config says as always; `ShardedRunner`, which this needs, splits it. Buffers are not
    broadcast, as in the toolboxes. Gradients are views of the buckets in which they are sent; apart, they would take
    their memory twice.
    """

    def __init__(self, module: nn.Module, **kwargs) -> None:
        super().__init__(module=module, **dict(dict(broadcast_buffers=False, gradient_as_bucket_view=True), **kwargs))


@MODEL_WRAPPERS.register_module()
@check_arguments()
class FullyShardedModel(nn.Module):
    """A model whose parameters, gradients and optimizer states are split among the processes (PyTorch's FSDP2).

    The parameters of a block of Swin V2 are together on a process only while that block is computed, in their own type,
    so that everything is as in DistributedDataParallel: names, per-parameter settings of the optimizer, autocast, the
    norm of all gradients. What is not in a block is one unit more. In eval mode all parameters are together, since
    processes that have different numbers of images to test could not wait for each other. Needs `ShardedRunner`.

    (mmengine's FSDPStrategy is built on FSDP1: it flattens parameters, and clips by the norm of a process's part, since
    it calls `torch.nn.utils.clip_grad_norm_` instead of FSDP1's own. With FSDP2 that function knows the parts.)

    Args:
        module: The model, with its initial weights.

    Raises:
        ImportError: This torch has no FSDP2.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if torch_release() < (2, 7):
            raise ImportError(
                f'FullyShardedModel needs torch 2.7 or newer, and this is {torch.__version__}; '
                'configs/_base_/memory/zero1.py needs no newer one'
            )
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.device(get_device()).type, (get_world_size(),))
        self._blocks = [fully_shard(m, mesh=mesh) for m in module.modules() if isinstance(m, SwinBlock)]
        self.module = fully_shard(module, mesh=mesh)
        for part in module.modules():
            part.register_load_state_dict_pre_hook(_split_entries)

    def train(self, mode: bool = True) -> 'FullyShardedModel':
        """Set the mode; all processes have to call this together."""
        for unit in (*self._blocks, self.module):
            if mode:
                unit.reshard()
            else:
                unit.unshard()
        for block in self._blocks:
            block.set_reshard_after_forward(mode)
        return super().train(mode)

    def forward(self, *args, **kwargs):
        """Call the model."""
        return self.module(*args, **kwargs)

    def train_step(self, data: dict, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """See `mmengine.model.BaseModel`."""
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data: dict) -> list:
        """See `mmengine.model.BaseModel`."""
        return self.module.val_step(data)

    def test_step(self, data: dict) -> list:
        """See `mmengine.model.BaseModel`."""
        return self.module.test_step(data)


SPLITTING = (ZeroDistributedDataParallel, FullyShardedModel)


def is_split(value: object) -> bool:
    """Whether a parameter, or anything else, is a tensor of which this process has a part."""
    return hasattr(value, 'device_mesh')


def split_like(whole: Tensor, param: Tensor) -> Tensor:
    """Split a tensor that every process has in the same way as a parameter."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(param.device), param.device_mesh, param.placements, src_data_rank=None)


def _split_entries(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Split the entries of a checkpoint that are parameters of `module` itself, just before they are copied."""
    for name, param in module.named_parameters(prefix.removesuffix('.'), recurse=False):
        entry = state_dict.get(name)
        if is_split(param) and isinstance(entry, Tensor) and not is_split(entry) and entry.shape == param.shape:
            state_dict[name] = split_like(entry, param)


def split_states(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    """Split the states of a checkpoint like the parameters that they belong to; called before they are loaded."""
    params = [param for group in optimizer.param_groups for param in group['params']]
    states = {}
    for index, state in state_dict['state'].items():
        param = params[index]
        states[index] = {
            name: split_like(value, param)
            if is_split(param) and isinstance(value, Tensor) and value.shape == param.shape
            else value
            for name, value in state.items()
        }
    return dict(state_dict, state=states)


def gather(value):
    """Replace split tensors at any depth by whole ones, in the memory of the first process's CPU; None elsewhere.

    One tensor after the other, so that no GPU holds more than one of them.
    """
    if isinstance(value, dict):
        return type(value)((key, gather(item)) for key, item in value.items())
    if not is_split(value):
        return value
    whole = value.full_tensor()
    return whole.cpu() if is_main_process() else None


@RUNNERS.register_module()
@check_arguments()
class ShardedRunner(Runner):
    """mmengine's Runner, for what the wrappers of this module split among the processes.

    The Runner itself saves checkpoints on the first process alone, where collecting the parts would wait for ever
    (open-mmlab/mmengine #551 has the history), and initialises the weights after it has wrapped the model. Here all
    processes take part in saving, and the weights are there before they are split.

    Raises:
        ValueError: An EMAHook is to average parameters that are split, which PyTorch cannot copy.
    """

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """See `mmengine.runner.Runner`."""
        wrapper = MODEL_WRAPPERS.get((model_wrapper_cfg or {}).get('type', 'MMDistributedDataParallel'))
        if self.distributed and wrapper is FullyShardedModel and hasattr(model, 'init_weights'):
            model.init_weights()
            for value in model.to(get_device()).state_dict().values():
                broadcast(value)
        return super().wrap_model(model_wrapper_cfg, model)

    def _init_model_weights(self) -> None:
        if not isinstance(self.model, FullyShardedModel):
            super()._init_model_weights()

    def build_optim_wrapper(self, optim_wrapper: OptimWrapper | dict) -> OptimWrapper:
        """See `mmengine.runner.Runner`."""
        if isinstance(self.model, ZeroDistributedDataParallel) and isinstance(optim_wrapper, dict):
            optimizer = optim_wrapper['optimizer']
            split = dict(type=ZeroRedundancyOptimizer, optimizer_class=OPTIMIZERS.get(optimizer['type']))
            optim_wrapper = dict(optim_wrapper, optimizer=dict(optimizer, **split))
        wrapper = super().build_optim_wrapper(optim_wrapper)
        if isinstance(self.model, FullyShardedModel):
            wrapper.optimizer.register_load_state_dict_pre_hook(split_states)
        return wrapper

    def train(self) -> nn.Module:
        """See `mmengine.runner.Runner`."""
        if isinstance(self.model, FullyShardedModel) and any(isinstance(hook, EMAHook) for hook in self.hooks):
            raise ValueError(
                'EMAHook copies the model, and PyTorch cannot copy one whose parameters are split (FullyShardedModel): '
                'leave the hook out, or split the optimizer states alone (configs/_base_/memory/zero1.py)'
            )
        return super().train()

    def save_checkpoint(self, *args, **kwargs) -> None:
        """Save a whole checkpoint, with the arguments of `mmengine.runner.Runner.save_checkpoint`; on every process."""
        with contextlib.ExitStack() as whole:
            if isinstance(self.optim_wrapper.optimizer, ZeroRedundancyOptimizer):
                self.optim_wrapper.optimizer.consolidate_state_dict(to=0)
            elif isinstance(self.model, FullyShardedModel):
                whole.enter_context(_gathered(self.model.module, self.optim_wrapper.optimizer))
            super().save_checkpoint(*args, **kwargs)


@contextlib.contextmanager
def _gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within this context, `state_dict()` of both gives whole tensors on the first process."""
    for owner in (model, optimizer):
        state = gather(owner.state_dict())
        owner.state_dict = lambda *args, state=state, **kwargs: state
    try:
        yield
    finally:
        for owner in (model, optimizer):
            del owner.state_dict
