"""The implementations of a case in memory, ready to take steps. A family's weights are there once."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from cases import Case, Implementation
from measure import DEVICE
from torch import Tensor, nn

MODES = ('inference', 'forward_backward', 'step')


class FeatureExtractor(nn.Module):
    """A model, and how to get features (B, ..., C) from it.

    Args:
        model: Any model.
        features: Calls it.
    """

    def __init__(self, model: nn.Module, features: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """Input -> (B, ..., C)."""
        return self.features(self.model, x)


@dataclass
class Runner:
    """An implementation that is ready to take steps."""

    implementation: Implementation
    extractor: FeatureExtractor
    call: Callable[[Tensor], Tensor]
    compile_seconds: dict[bool, float] = field(default_factory=dict)  # by whether it trains

    def step(
        self, mode: str, x: Tensor, grad_out: Tensor, dtype: torch.dtype, optimizer: torch.optim.Optimizer | None
    ) -> Tensor:
        """One step with the gradient of the features; returns the features."""
        with (
            torch.inference_mode(mode == 'inference'),
            torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32),
        ):
            features = self.call(x)
        if mode != 'inference':
            features.backward(grad_out.to(features.dtype).view(features.shape))
        if mode == 'step':
            optimizer.step()
        return features.detach()

    def clear(self, x: Tensor) -> None:
        """Drop gradients."""
        x.grad = None
        self.extractor.zero_grad(set_to_none=True)


class CaseRunner:
    """Builds each implementation of a case once, and takes steps with it.

    Args:
        case: What they compute.
        dtype: Autocast's type, or float32 for none.
    """

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        self.x, self.grad_out = (
            torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
            for seed, shape in enumerate((case.input_shape, case.output_shape))
        )
        self.models: dict[str, nn.Module] = {}
        self.runners: dict[str, Runner] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def runner(self, implementation: Implementation, mode: str) -> Runner:
        """An implementation in a mode, built at the first call.

        Raises:
            NotSupportedError: It cannot compute the case.
        """
        if implementation.name not in self.runners:
            self.runners[implementation.name] = self._build(implementation)
        runner = self.runners[implementation.name]
        runner.extractor.train(mode != 'inference')
        self.x.requires_grad_(self.case.input_grad and mode != 'inference')
        if mode == 'step' and implementation.family not in self.optimizers:
            parameters = self.models[implementation.family].parameters()
            # a learning rate of 0 saves no work, and leaves the weights as they were checked
            self.optimizers[implementation.family] = torch.optim.AdamW(parameters, lr=0.0, fused=True)
        return runner

    def _build(self, implementation: Implementation) -> Runner:
        family = self.case.families[implementation.family]
        if implementation.family not in self.models:
            torch.manual_seed(0)
            self.models[implementation.family] = family.build().to(DEVICE)
        model = share_weights(self.models[implementation.family])
        implementation.prepare(model)
        extractor = FeatureExtractor(model, family.features)
        return Runner(implementation, extractor, torch.compile(extractor) if implementation.compiled else extractor)

    def step(self, runner: Runner, mode: str, grad_out: Tensor) -> Tensor:
        """One step without gradients left over from another; returns the features."""
        runner.clear(self.x)
        return runner.step(mode, self.x, grad_out, self.dtype, self.optimizers.get(runner.implementation.family))


def share_weights(model: nn.Module) -> nn.Module:
    """Copy a model, but not its parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
