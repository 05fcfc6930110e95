"""Counts the memory of tensors: live bytes, their peak, and what a backbone keeps from forward to backward.

Works with real tensors and with fake ones, which have shapes but no memory: a training step of SwinV2-G at 1536x1536
can be measured on a laptop. Needs no toolbox.
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

# operators of Swin and the toolboxes' heads that autocast computes in float32 on a GPU, but not on a CPU
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
    """Counts the bytes of all storages that operators allocate while it is active, until they are freed.

        with MemoryTracker() as tracker:
            model(x).sum().backward()
        print(tracker.peak)

    Views share a storage, which counts once. Tensors that were allocated before count after `watch`. Not counted are
    workspaces inside a kernel, such as that of a convolution, rounding and fragmentation of the allocator, and tensors
    on the meta device. For fake tensors, enter `FakeTensorMode` first.

    Attributes:
        live: Live bytes.
        peak: Largest number of live bytes at the end of an operator, since the start or `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {}  # counted bytes of each live storage; 0 if it was allocated before

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are already allocated, such as parameters."""
        for tensor in tensors:
            self._is_new(tensor)
            self._count(tensor)

    def reset_peak(self) -> None:
        """Reset the peak to the live bytes."""
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
        """Register the storage of a tensor; returns whether it was new."""
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
    """Make autocast on a CPU cast as on a GPU, where norms, softmax and losses are computed in float32."""
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
    """Make SDPA attention and MLPs on a CPU process as many windows and tokens at a time as on a GPU."""
    on_cpu = sdpa.CHUNKS['cpu'], block.CPU_TOKENS
    sdpa.CHUNKS['cpu'], block.CPU_TOKENS = sdpa.CHUNKS['cuda'], sys.maxsize
    try:
        yield
    finally:
        sdpa.CHUNKS['cpu'], block.CPU_TOKENS = on_cpu


def make_fake(model: nn.Module) -> nn.Module:
    """Replace parameters and buffers on the meta device by fake tensors on the CPU; call it in a `FakeTensorMode`."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            fake = torch.empty(value.shape, dtype=value.dtype)
            module.register_parameter(name, nn.Parameter(fake, value.requires_grad))
        for name, value in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)
    return model


class SkippedProducts(TorchDispatchMode):
    """Returns zeros of the right shape instead of convolutions and matrix products, for measurements of memory only.

    Code that depends on data, such as the selection of proposals, still runs, in a fraction of the time.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """See `TorchDispatchMode`."""
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        shapes = func(*tree_map_only(Tensor, lambda x: x.to('meta'), args), **(kwargs or {}))
        return tree_map_only(Tensor, lambda x: torch.zeros_like(x, device='cpu'), shapes)


class ZeroLoss(torch.autograd.Function):
    """A loss of zero that saves none of its inputs for backward, so that they are freed with their last reference.

        ZeroLoss.apply(*backbone(x)).backward()

    As in real heads, its backward pass allocates the gradients of all outputs before any of them is used.
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
    """Memory of a training step of a backbone in addition to parameters and their gradients, in bytes.

    Attributes:
        kept: Live bytes from forward to backward, outputs included: of the patch embedding, then of each stage with its
            patch merging and output norm.
        forward_peak: Peak of the forward pass.
        backward_peak: Peak of the backward pass.
        outputs: Outputs on the meta device.
    """

    kept: list[int]
    forward_peak: int
    backward_peak: int
    outputs: list[Tensor]


def measure_backbone(backbone: nn.Module, x: Tensor, bfloat16: bool = False) -> BackboneMemory:
    """Run forward and backward of a Swin V2 backbone and count memory; for fake tensors, call it in their mode.

    The gradients of parameters are allocated before the step, as in gradient accumulation and as the views of DDP's
    buckets. The input is counted.

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
    """Resident bytes of this process: now (VmRSS) or at most (VmHWM). `getrusage` includes the peak of the parent."""
    return 1024 * int(re.search(rf'{field}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])
