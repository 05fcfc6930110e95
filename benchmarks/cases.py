"""The data types of a comparison: a case, the families of models in it, and their implementations."""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


class NotSupportedError(Exception):
    """An implementation does not support a case, or does not fit into memory; its row gives the reason."""


@dataclass(frozen=True)
class Family:
    """Implementations that share their weights: ours, timm's, ...

    Attributes:
        build: Makes the model, on the CPU, with randomized weights; may raise `NotSupportedError`.
        features: Calls the model: (model, input) -> (B, ..., C).
        reference: Makes our model with the reference backend, in float64, with the weights of a model.
        reference_features: Calls that model.
        qkv: Names of the weights of query, key and value in the first block.
        cpb: Name of the first weight of the position bias MLP there.
    """

    build: Callable[[], nn.Module]
    features: Callable[[nn.Module, Tensor], Tensor]
    reference: Callable[[nn.Module], nn.Module]
    reference_features: Callable[[nn.Module, Tensor], Tensor]
    qkv: tuple[str, ...] = ('layers.0.blocks.0.attn.qkv.weight',)
    cpb: str = 'layers.0.blocks.0.attn.cpb_mlp.0.weight'


@dataclass(frozen=True)
class Implementation:
    """A way to compute the model of a family.

    Attributes:
        name: Name in tables.
        family: Key of its family.
        prepare: Turns a copy of the family's model into this implementation; may raise `NotSupportedError`.
        compiled: Whether it goes through torch.compile.
        dense: Whether the N x N logits of all windows of a block are in memory, in inference and in training.
    """

    name: str
    family: str
    prepare: Callable[[nn.Module], None] = lambda model: None
    compiled: bool = False
    dense: tuple[bool, bool] = (True, True)

    def eager_and_compiled(self) -> Iterator['Implementation']:
        """This implementation as it is, and compiled."""
        for compiled in (False, True):
            name = f'{self.name} {"compiled" if compiled else "eager"}'
            yield Implementation(name, self.family, self.prepare, compiled, self.dense)


@dataclass(frozen=True)
class Case:
    """What all implementations compute.

    Attributes:
        name: Name in tables.
        input_shape: Shape of the input, with the batch.
        output_shape: Shape of the features: (B, tokens, C).
        flops: FLOP of a forward pass of one image.
        logits: Attention logits of each block, of the whole batch.
        families: Families by name.
        implementations: The implementations to compare.
        input_grad: Whether training needs the gradient of the input.
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, int, int]
    flops: int
    logits: tuple[int, ...]
    families: dict[str, Family]
    implementations: Sequence[Implementation]
    input_grad: bool = False


def choose(implementations: Sequence[Implementation], patterns: Sequence[str]) -> list[Implementation]:
    """Implementations whose names match one of some shell patterns.

    Raises:
        ValueError: None matches a pattern.
    """
    for pattern in patterns:
        if not fnmatch.filter([i.name for i in implementations], pattern):
            names = ', '.join(i.name for i in implementations)
            raise ValueError(f'no implementation matches --implementations {pattern!r}; there are: {names}')
    return [i for i in implementations if any(fnmatch.fnmatch(i.name, pattern) for pattern in patterns)]
