"""Model sizes, and arguments of a backbone resolved per stage and axis."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from ..arguments import NotNegative, Positive, check_value

# Sec. 3.5 of the paper; every head has 32 channels. `giant_simmim` is the size of the SimMIM files named "giant".
# SimMIM's `huge` and `giant` have no extra norms: load those with `extra_norm_every_n_blocks=0`.
ARCHS = {
    'tiny': dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    'small': dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    'base': dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'large': dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    'huge': dict(embed_dims=352, depths=(2, 2, 18, 2), num_heads=(11, 22, 44, 88), extra_norm_every_n_blocks=6),
    'giant_simmim': dict(embed_dims=448, depths=(2, 2, 18, 2), num_heads=(14, 28, 56, 112)),
    'giant': dict(embed_dims=512, depths=(2, 2, 42, 4), num_heads=(16, 32, 64, 128), extra_norm_every_n_blocks=6),
}
ARCH_HINTS = dict(
    embed_dims=Positive,
    depths=Sequence[NotNegative],
    num_heads=Sequence[Positive],
    extra_norm_every_n_blocks=NotNegative,
)


def resolve_arch(arch: str | dict) -> dict[str, Any]:
    """Look up an `arch` by its name, or check a dict.

    Returns:
        Entries for all keys of `ARCH_HINTS`, lists as tuples.

    Raises:
        TypeError: An entry of the dict is of another type.
        ValueError: The name is unknown; or the dict has other keys, or numbers that do not match each other.
    """
    keys = tuple(ARCH_HINTS)
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'arch {arch!r} is not known; use one of {", ".join(ARCHS)}, or a dict with {keys}')
        arch = ARCHS[arch]
    arch = dict(dict(extra_norm_every_n_blocks=0), **arch)
    if set(arch) != set(keys):
        raise ValueError(f'arch must have the keys {keys}, the last one optional, got {tuple(arch)}')
    for key, hint in ARCH_HINTS.items():
        check_value(f'arch.{key}', arch[key], hint)
    depths, heads = (tuple(map(int, arch[key])) for key in ('depths', 'num_heads'))
    if not depths or len(depths) != len(heads):
        raise ValueError(f'depths and num_heads of arch must have one entry per stage, got {depths} and {heads}')
    for i, num in enumerate(heads):
        dim = arch['embed_dims'] * 2**i
        if dim % num:
            raise ValueError(
                f'num_heads must divide the channels of its stage: {num} does not divide the {dim} of stage {i}'
            )
    return dict(arch, depths=depths, num_heads=heads)


def per_axis(
    name: str, value: int | Sequence[int], num_axes: int, minimum: int = 0, time: int | None = None
) -> tuple[int, ...]:
    """Expand `value` to one number per axis.

    A single number stands for all axes, or only for height and width if `time` is the number for the time axis.

    Raises:
        ValueError: There are not `num_axes` numbers, or one is below the minimum.
    """
    if isinstance(value, Integral):
        axes = (value if time is None else time,) * (num_axes - 2) + (value,) * 2
    else:
        axes = tuple(value)
    if len(axes) != num_axes or not all(isinstance(a, Integral) and a >= minimum for a in axes):
        raise ValueError(f'{name} must be a number of at least {minimum}, or {num_axes} of them, got {value!r}')
    return tuple(map(int, axes))


def per_stage(
    name: str, value: int | Sequence, num_stages: int, num_axes: int, minimum: int = 0, time: int | None = None
) -> list[tuple[int, ...]]:
    """Expand `value` to one number per axis for each stage, see `per_axis`; a single entry stands for all stages.

    Raises:
        ValueError: There are not `num_stages` entries, or one is invalid.
    """
    if isinstance(value, Integral):
        stages = [value] * num_stages
    elif len(value) == num_axes and all(isinstance(entry, Integral) for entry in value):
        if num_axes == num_stages:
            raise ValueError(f'{name}={value!r} may mean axes or stages: write {num_axes} numbers for each stage')
        stages = [value] * num_stages
    else:
        stages = list(value)
    if len(stages) != num_stages:
        raise ValueError(
            f'{name} must be one number, {num_axes} for the axes, or one entry for each of the {num_stages} stages, '
            f'got {value!r}'
        )
    return [per_axis(f'{name} of stage {i}', stage, num_axes, minimum, time) for i, stage in enumerate(stages)]


def check_stages(name: str, indices: Sequence[int], num_stages: int) -> None:
    """Check a list of stage indices.

    Raises:
        ValueError: An index is out of range or repeated, or `out_indices` is empty.
    """
    if not all(0 <= i < num_stages for i in indices) or len(set(indices)) != len(indices):
        raise ValueError(f'{name} must be different stages between 0 and {num_stages - 1}, got {tuple(indices)}')
    if name == 'out_indices' and not len(indices):
        raise ValueError('out_indices must name at least one stage')
