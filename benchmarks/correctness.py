"""The correctness gate: an implementation is timed only if it agrees with the reference in float64."""

from collections.abc import Sequence

import torch
from cases import Family, Implementation, NotSupportedError
from measure import DEVICE, available_memory, returning_freed_memory
from runners import CaseRunner, FeatureExtractor
from torch import Tensor, nn
from torch.utils.benchmark import timer

# Largest error of features, relative to the largest value, that rounding may explain; mistakes in windows or masks are
# larger. Gradients pass through all blocks twice: that of a bias MLP which autocast runs in bfloat16, as in the peers,
# is off by a quarter in SwinV2-T.
LIMITS = {torch.float32: 3e-4, torch.float16: 0.03, torch.bfloat16: 0.1}
GRADIENTS = 8  # times the limit


class CorrectnessGate:
    """Compares features and gradients of implementations with those of the reference in float64.

    Only the first and the last image are compared: the reference is slow. The gradient of the features is 0 for the
    other images in this step.

    Args:
        case_runner: The implementations.
    """

    def __init__(self, case_runner: CaseRunner) -> None:
        self.case_runner = case_runner
        self.images = sorted({0, len(case_runner.x) - 1})
        self._expected: dict[tuple[str, bool], dict[str, Tensor]] = {}

    def errors(self, implementation: Implementation, mode: str) -> dict[str, float]:
        """Take the first step and return its largest errors, relative to the largest expected value.

        Raises:
            NotSupportedError: It cannot take it.
        """
        training, case = mode != 'inference', self.case_runner.case
        needed, available = dense_bytes(case.logits, training), available_memory()
        if implementation.dense[training] and needed > 0.9 * available:
            raise NotSupportedError(
                f'does not fit: N x N matrices of {needed / 1e9:.1f} GB, of {available / 1e9:.1f} GB available'
            )
        runner = self.case_runner.runner(implementation, mode)
        expected = self.expected(implementation.family, training)
        grad_out = torch.zeros_like(self.case_runner.grad_out)
        grad_out[self.images] = self.case_runner.grad_out[self.images]
        start = timer()
        features = self.case_runner.step(runner, mode, grad_out)
        if implementation.compiled:
            runner.compile_seconds.setdefault(training, timer() - start)
        family = case.families[implementation.family]
        found = _compared(features[self.images], runner.extractor.model, family.qkv, family.cpb, training)
        return {
            key: float((found[key] - value).abs().max() / value.abs().max().clamp(min=1e-30))
            for key, value in expected.items()
        }

    @returning_freed_memory()
    def expected(self, name: str, training: bool) -> dict[str, Tensor]:
        """Features and gradients of the reference in float64 with the weights of a family."""
        if (name, training) not in self._expected:
            case, model = self.case_runner.case, self.case_runner.models[name]
            family = case.families[name]
            reference = family.reference(model).to(DEVICE).train(training)
            x = self.case_runner.x[self.images].double().requires_grad_(case.input_grad and training)
            with torch.set_grad_enabled(training):
                features = FeatureExtractor(reference, family.reference_features)(x)
            if training:
                features.backward(self.case_runner.grad_out[self.images].double().view(features.shape))
            self._expected[name, training] = _compared(features, reference, Family.qkv, Family.cpb, training)
        return self._expected[name, training]


def is_correct(errors: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether rounding explains these errors in a type."""
    limits = {key: LIMITS[dtype] * (GRADIENTS if 'grad' in key else 1) for key in errors}
    return all(value <= limits[key] for key, value in errors.items())  # False for NaN


def dense_bytes(logits: Sequence[int], training: bool) -> int:
    """Estimate the memory of the N x N matrices of a step from the number of logits of each block.

    Three matrices in float32 while one block is computed; in training each block keeps two for the backward pass.
    """
    return 12 * max(logits) + (8 * sum(logits) if training else 0)


def _compared(features: Tensor, model: nn.Module, qkv: Sequence[str], cpb: str, training: bool) -> dict[str, Tensor]:
    """What is compared, in float64: features (images, tokens, C), and in training two gradients."""
    found = dict(features=features.detach().flatten(1, -2).double())
    if training:
        found['qkv grad'] = torch.cat([_weight(model, name).grad for name in qkv]).double()
        found['cpb grad'] = _weight(model, cpb).grad.double()
    return found


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    """A parameter of a model, or of an attention module."""
    parameters = dict(model.named_parameters())
    return parameters[name] if name in parameters else parameters[name.split('.attn.')[-1]]
