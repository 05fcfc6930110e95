"""Memory of tensors, counted: what is alive, its peak, and what a backbone keeps from forward to backward.

The same counting serves real tensors and fake ones, which have shapes but no memory: a training step of SwinV2-G at
1536x1536 can be measured on a laptop. Needs no toolbox.
"""

import contextlib
import functools
import itertools
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..models import block
from ..ops import sdpa

# what autocast computes in float32 on a GPU but not on a CPU, as far as Swin and the toolboxes' heads call it
FLOAT32_ON_CUDA = (
    torch.ops.aten.layer_norm.default,
    torch.ops.aten.group_norm.default,
    torch.ops.aten.softmax.int,
    torch.ops.aten.log_softmax.int,
    torch.ops.aten.cross_entropy_loss.default,
    torch.ops.aten.binary_cross_entropy_with_logits.default,
)
PRODUCTS = {
    torch.ops.aten.convolution,
    torch.ops.aten.convolution_backward,
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is active, as long as they live.

        with MemoryTracker() as tracker:
            model(x).sum().backward()
        print(tracker.peak)

    Views share a storage, which counts once. What was there before counts if it is given to `watch`. Not counted is
    what a kernel takes and gives back on its own, such as the workspace of a convolution, nor an allocator's rounding
    and fragmentation, nor what is on the meta device. For fake tensors, enter `FakeTensorMode` first.

    Attributes:
        live: Bytes alive.
        peak: Largest number of bytes alive at the end of any operation, since the start or `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {}  # what each living storage counts; 0 if it was there before

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already, such as parameters."""
        for tensor in tensors:
            self._is_new(tensor)
            self._count(tensor)

    def reset_peak(self) -> None:
        """Start a new measurement of the peak from what is alive."""
        self.peak = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """See `TorchDispatchMode`."""
        for tensor in _tensors((args, kwargs)):
            self._is_new(tensor)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            if self._is_new(tensor):
                self._count(tensor)
        return out

    def _is_new(self, tensor: Tensor) -> bool:
        """Whether a storage was not seen before; from now on it is."""
        storage = tensor.untyped_storage()
        key = id(storage)  # the Python object of a storage lives as long as its memory
        if key in self._sizes:
            return False
        self._sizes[key] = 0
        weakref.finalize(storage, self._remove, key).atexit = False
        return True

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.live += storage.nbytes() - self._sizes[id(storage)]
        self._sizes[id(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _tensors(value) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and not leaf.is_meta)


@contextlib.contextmanager
def cuda_casts() -> Iterator[None]:
    """Let autocast on a CPU cast as on a GPU, where norms, softmax and losses are computed in float32."""
    with torch.library._scoped_library('aten', 'IMPL') as library:
        for operation in FLOAT32_ON_CUDA:
            library.impl(operation, functools.partial(_in_float32, operation), 'AutocastCPU')
        yield


def _in_float32(operation: Callable, *args, **kwargs) -> Tensor:
    args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
    with torch.autocast('cpu', enabled=False):
        return operation(*args, **kwargs)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


@contextlib.contextmanager
def cuda_chunks() -> Iterator[None]:
    """Let fused attention and MLPs on a CPU take as many windows and tokens at a time as on a GPU."""
    on_cpu = sdpa.CHUNKS['cpu'], block.CPU_TOKENS
    sdpa.CHUNKS['cpu'], block.CPU_TOKENS = sdpa.CHUNKS['cuda'], sys.maxsize
    try:
        yield
    finally:
        sdpa.CHUNKS['cpu'], block.CPU_TOKENS = on_cpu


def make_fake(model: nn.Module) -> nn.Module:
    """Give the parameters and buffers of a model on the meta device fake memory of the CPU, in a `FakeTensorMode`."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            fake = torch.empty(value.shape, dtype=value.dtype)
            module.register_parameter(name, nn.Parameter(fake, value.requires_grad))
        for name, value in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)
    return model


class SkippedProducts(TorchDispatchMode):
    """Gives zeros of the right shape in place of convolutions and matrix products, where memory alone is of interest.

    What depends on data still runs, such as the choice of proposals, in a fraction of the time.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """See `TorchDispatchMode`."""
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        shapes = func(*tree_map_only(Tensor, lambda x: x.to('meta'), args), **(kwargs or {}))
        return tree_map_only(Tensor, lambda x: torch.zeros_like(x, device='cpu'), shapes)


class ZeroLoss(torch.autograd.Function):
    """A loss of zero that keeps nothing of the outputs it is of, so that they go when their users let go of them.

        ZeroLoss.apply(*backbone(x)).backward()

    Like that of heads, its backward pass makes the gradients of all outputs before any of them is used.
    """

    @staticmethod
    def forward(ctx, *outputs: Tensor) -> Tensor:
        """Tensors of any shapes -> a scalar."""
        ctx.device = outputs[0].device
        ctx.shapes = [torch.empty_like(x, device='meta') for x in outputs]
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, ...]:
        """Zeros for each of the outputs."""
        return tuple(torch.zeros_like(x, device=ctx.device) for x in ctx.shapes)


@dataclass
class BackboneMemory:
    """What a training step of a backbone takes beside parameters and their gradients, in bytes.

    Attributes:
        kept: What the patch embedding and then each stage, with its patch merging and its output norm, leave alive from
            forward to backward, outputs included.
        forward_peak: Peak of the forward pass.
        backward_peak: Peak of the backward pass.
        outputs: Outputs on the meta device.
    """

    kept: list[int]
    forward_peak: int
    backward_peak: int
    outputs: list[Tensor]


def measure_backbone(backbone: nn.Module, x: Tensor, bfloat16: bool = False) -> BackboneMemory:
    """Run forward and backward of a Swin V2 backbone and count memory; of fake tensors too, within their mode.

    The gradients of parameters are there before the step, as they are while gradients are accumulated and as the views
    of DDP's buckets are. The input is counted.

    Args:
        backbone: A `SwinV2` on the CPU.
        x: Input, (N, C, *input size).
        bfloat16: Whether to compute with autocast to bfloat16, as on a GPU.
    """
    make_gradients(backbone)
    with cuda_casts(), MemoryTracker() as tracker:
        tracker.watch([x])
        bounds = [0]
        hooks = [layer.register_forward_pre_hook(lambda *_: bounds.append(tracker.live)) for layer in backbone.layers]
        with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
            outputs = backbone(x)
        bounds.append(tracker.live)
        forward_peak = tracker.peak
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        shapes = [torch.empty_like(output, device='meta') for output in outputs]
        loss = ZeroLoss.apply(*outputs)
        del outputs
        tracker.reset_peak()
        loss.backward()
    for hook in hooks:
        hook.remove()
    return BackboneMemory([b - a for a, b in itertools.pairwise(bounds)], forward_peak, tracker.peak, shapes)


def make_gradients(model: nn.Module) -> None:
    """Give every trained parameter a gradient of zeros."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM); `getrusage` knows the peak of its parent too."""
    return 1024 * int(re.search(rf'{field}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])
