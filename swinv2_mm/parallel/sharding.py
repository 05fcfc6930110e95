"""Sharded training in mmengine's Runner: of optimizer states (ZeRO-1), or of parameters too (FSDP2).

`configs/_base_/memory/zero1.py` and `fsdp.py` enable it. They set only `runner_type` and `model_wrapper_cfg`, so any
config can inherit from them. Checkpoints have the format of an ordinary training.
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
    """DistributedDataParallel with optimizer states sharded over the processes (ZeRO-1, Sec. 3.4).

    Each process updates its share of the parameters and broadcasts them. The optimizer is set in `optim_wrapper` as
    usual; `ShardedRunner`, which is required, shards it. Buffers are not broadcast, as in the toolboxes. Gradients are
    views of the communication buckets, because separate ones would double their memory.
    """

    def __init__(self, module: nn.Module, **kwargs) -> None:
        super().__init__(module=module, **dict(dict(broadcast_buffers=False, gradient_as_bucket_view=True), **kwargs))


@MODEL_WRAPPERS.register_module()
@check_arguments()
class FullyShardedModel(nn.Module):
    """A model whose parameters, gradients and optimizer states are sharded over the processes (PyTorch's FSDP2).

    Each Swin V2 block is one FSDP unit, and the rest of the model another one. Parameters are gathered in their own
    dtype while their unit is computed. Parameter names, per-parameter optimizer settings, autocast and the total
    gradient norm are therefore those of DistributedDataParallel. In eval mode all parameters stay gathered, because
    processes with different numbers of test images would deadlock otherwise. Requires `ShardedRunner`.

    (mmengine's FSDPStrategy uses FSDP1. It flattens parameters, and clips by the norm of the local shard, because it
    calls `torch.nn.utils.clip_grad_norm_` instead of FSDP1's own method. FSDP2 supports that function.)

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
            part.register_load_state_dict_pre_hook(_shard_entries)

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


SHARDED_WRAPPERS = (ZeroDistributedDataParallel, FullyShardedModel)


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor, of which each process has a shard; torch without FSDP2 has none."""
    return hasattr(value, 'device_mesh')


def shard_like(full: Tensor, param: Tensor) -> Tensor:
    """Shard a full tensor, which every process has, like a parameter."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(param.device), param.device_mesh, param.placements, src_data_rank=None)


def _shard_entries(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Shard the entries of a checkpoint that are direct parameters of `module`, before they are copied."""
    for name, param in module.named_parameters(prefix.removesuffix('.'), recurse=False):
        entry = state_dict.get(name)
        if is_dtensor(param) and isinstance(entry, Tensor) and not is_dtensor(entry) and entry.shape == param.shape:
            state_dict[name] = shard_like(entry, param)


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    """Shard the optimizer state of a checkpoint like the parameters; a pre-hook of `load_state_dict`."""
    params = [param for group in optimizer.param_groups for param in group['params']]
    states = {}
    for index, state in state_dict['state'].items():
        param = params[index]
        states[index] = {
            name: shard_like(value, param)
            if is_dtensor(param) and isinstance(value, Tensor) and value.shape == param.shape
            else value
            for name, value in state.items()
        }
    return dict(state_dict, state=states)


def gather_to_rank0(value):
    """Replace DTensors at any depth by full tensors on the CPU of rank 0, and by None on the other ranks.

    One tensor at a time, so that a GPU never stores more than one full tensor. (`get_state_dict` of
    torch.distributed.checkpoint gathers too, but names the optimizer state by parameters. An ordinary checkpoint has
    the indices of `Optimizer.state_dict`.)
    """
    if isinstance(value, dict):
        return type(value)((key, gather_to_rank0(item)) for key, item in value.items())
    if not is_dtensor(value):
        return value
    full = value.full_tensor()
    return full.cpu() if is_main_process() else None


@RUNNERS.register_module()
@check_arguments()
class ShardedRunner(Runner):
    """mmengine's Runner for the wrappers of this module.

    The Runner saves checkpoints only on rank 0, where gathering would deadlock (open-mmlab/mmengine #551), and
    initialises the weights after wrapping the model. Here all processes take part in saving, and the weights are
    initialised before they are sharded.

    Raises:
        ValueError: The config has an EMAHook and FullyShardedModel; PyTorch cannot copy sharded parameters.
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
            sharded = dict(type=ZeroRedundancyOptimizer, optimizer_class=OPTIMIZERS.get(optimizer['type']))
            optim_wrapper = dict(optim_wrapper, optimizer=dict(optimizer, **sharded))
        wrapper = super().build_optim_wrapper(optim_wrapper)
        if isinstance(self.model, FullyShardedModel):
            wrapper.optimizer.register_load_state_dict_pre_hook(shard_optimizer_state)
        return wrapper

    def train(self) -> nn.Module:
        """See `mmengine.runner.Runner`."""
        if isinstance(self.model, FullyShardedModel) and any(isinstance(hook, EMAHook) for hook in self.hooks):
            raise ValueError(
                'EMAHook copies the model, and PyTorch cannot copy one with sharded parameters (FullyShardedModel): '
                'leave the hook out, or shard only the optimizer states (configs/_base_/memory/zero1.py)'
            )
        return super().train()

    def save_checkpoint(self, *args, **kwargs) -> None:
        """Save a full checkpoint, with the arguments of `mmengine.runner.Runner.save_checkpoint`; on every process."""
        with contextlib.ExitStack() as stack:
            if isinstance(self.optim_wrapper.optimizer, ZeroRedundancyOptimizer):
                self.optim_wrapper.optimizer.consolidate_state_dict(to=0)
            elif isinstance(self.model, FullyShardedModel):
                stack.enter_context(_full_state_dicts(self.model.module, self.optim_wrapper.optimizer))
            super().save_checkpoint(*args, **kwargs)


@contextlib.contextmanager
def _full_state_dicts(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within this context, `state_dict()` of both returns full tensors on rank 0."""
    for owner in (model, optimizer):
        state = gather_to_rank0(owner.state_dict())
        owner.state_dict = lambda *args, state=state, **kwargs: state
    try:
        yield
    finally:
        for owner in (model, optimizer):
            del owner.state_dict
