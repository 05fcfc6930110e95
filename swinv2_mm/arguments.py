"""Argument checks for constructors: a wrong argument raises a one-line error with a hint what to write instead.

    @check_arguments()
    class GlobalAttention(BaseModule):
        def __init__(self, in_channels: Positive, num_heads: int, drop_path_rate: Rate = 0.0) -> None:

Names and type hints of the signature define what is valid. Uses only the standard library.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

Class = TypeVar('Class', bound=type)


@dataclass(frozen=True)
class Range:
    """Numbers in [low, end); `demand` describes them in error messages."""

    demand: str
    low: float
    end: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.end


Positive = Annotated[int, Range('be at least 1', 1)]
NotNegative = Annotated[int, Range('be at least 0', 0)]
Rate = Annotated[float, Range('lie in [0, 1)', 0, 1)]

# type hint -> accepted types (NumPy numbers and tuples included), and their name in error messages
KINDS = {
    int: (Integral, 'a whole number'),
    float: (Real, 'a number'),
    bool: (bool, 'True or False'),
    str: (str, 'a string'),
    dict: (dict, 'a dict'),
    Sequence: (Collection, 'a list'),
    NoneType: (NoneType, 'None'),
}


def check_arguments(foreign: Mapping[str, str] | None = None, more: Callable | None = None) -> Callable[[Class], Class]:
    """Class decorator: check the arguments of the constructor before it runs. The signature is unchanged.

    The constructor gets an attribute `check(name, kwargs, *args)`, which checks arguments without creating an object.

    Args:
        foreign: Hints what to write instead of arguments of other implementations, by argument name.
        more: Method whose optional arguments the constructor also takes, through `**kwargs`.
    """

    def decorate(cls: Class) -> Class:
        own = vars(cls).get('__init__')

        def check(name: str, kwargs: Mapping[str, Any], *args) -> None:
            check_call(name, arguments_of(cls, more), args, kwargs, foreign or {})

        @functools.wraps(_without_arguments if cls.__init__ is object.__init__ else cls.__init__)
        def checked(self, *args, **kwargs) -> None:
            check(type(self).__name__, kwargs, *args)
            if own is None:
                super(cls, self).__init__(*args, **kwargs)
            else:
                own(self, *args, **kwargs)

        checked.check = check
        cls.__init__ = checked
        return cls

    return decorate


def _without_arguments(self) -> None:
    """Stand-in for `object.__init__`, whose signature has `*args, **kwargs`."""


@functools.cache
def arguments_of(cls: type, more: Callable | None = None) -> dict[str, inspect.Parameter]:
    """Arguments of a constructor, including those of base classes that it passes `*args` and `**kwargs` on to.

    For base classes of other packages, only type hints of numbers are kept: many of the others are wrong.
    """
    package = cls.__module__.split('.')[0]
    found = _collect(cls.__mro__[:-1], package)
    others = _named(inspect.unwrap(more), package) if more else {}
    return {**found, **{n: p for n, p in others.items() if n not in found and p.default is not p.empty}}


def _collect(mro: Sequence[type], package: str) -> dict[str, inspect.Parameter]:
    """Parameters of the first `__init__` in `mro`, and of later ones as far as it has `*args` and `**kwargs`."""
    mro = list(mro)
    while mro and '__init__' not in vars(mro[0]):
        del mro[0]
    if not mro:
        return {}
    init = inspect.unwrap(vars(mro[0])['__init__'])
    own = _named(init, package)
    kinds = [p.kind for p in inspect.signature(init).parameters.values()]
    inherited = _collect(mro[1:], package) if inspect.Parameter.VAR_KEYWORD in kinds else {}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return {**inherited, **own}  # positional arguments are in the order of the base class
    return {**own, **inherited, **own}


def _named(method: Callable, package: str) -> dict[str, inspect.Parameter]:
    """Parameters of a method without `self`, `*args` and `**kwargs`; see `arguments_of` for their type hints."""
    _, *parameters = inspect.signature(method).parameters.values()  # without `self`
    found = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if method.__module__.split('.')[0] == package:
        return found
    return {n: p.replace(annotation=float if p.annotation in (int, float) else p.empty) for n, p in found.items()}


def check_call(
    name: str,
    arguments: Mapping[str, inspect.Parameter],
    args: Sequence,
    kwargs: Mapping[str, Any],
    foreign: Mapping[str, str],
) -> None:
    """Check the arguments of a call.

    Args:
        name: Name of the callable, for error messages.
        arguments: Parameters of the callable.
        args: Positional arguments.
        kwargs: Keyword arguments.
        foreign: See `check_arguments`.

    Raises:
        TypeError: An argument is unknown, missing, or of another type than its hint.
        ValueError: A number is out of range.
    """
    unknown = [_describe_unknown(key, arguments, foreign) for key in kwargs if key not in arguments]
    if unknown:
        raise TypeError(
            f'{name} has no argument {"; ".join(unknown)}. Its arguments are {", ".join(arguments) or "none"}'
        )
    values = {**dict(zip(arguments, args, strict=False)), **kwargs}
    missing = [key for key, p in arguments.items() if p.default is p.empty and key not in values]
    if missing:
        raise TypeError(f'{name} needs the argument {" and ".join(missing)}')
    for key, value in values.items():
        check_value(key, value, arguments[key].annotation)


def _describe_unknown(key: str, arguments: Iterable[str], foreign: Mapping[str, str]) -> str:
    """Name of an unknown argument, followed by what to write instead, if known."""
    if key in foreign:
        return f'{key} ({foreign[key]})'
    return key + did_you_mean(key, arguments)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suffix of an error message with the known names closest to an unknown one, or ''."""
    names = {_plain(candidate): candidate for candidate in known}
    close = difflib.get_close_matches(_plain(name), names, cutoff=0.75)
    return f' (did you mean {" or ".join(names[match] for match in close)}?)' if close else ''


def _plain(name: str) -> str:
    """Last part of a dotted name, without case and underscores, for `did_you_mean`."""
    return name.rpartition('.')[2].replace('_', '').lower()


def check_value(name: str, value: Any, hint: Any) -> None:
    """Check a value against a type hint: numbers, strings, dicts, None, `Range`s, lists of these, and unions.

    Other hints are not checked. All entries of a list are checked against the same hint.

    Raises:
        TypeError: The value is of another type.
        ValueError: A number is out of range, or a tuple has another length.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not all(_base(kind) in KINDS for kind in kinds):
        return
    kind = next((kind for kind in kinds if _is(value, _base(kind))), None)
    if kind is None:
        demand = ' or '.join(KINDS[_base(kind)][1] for kind in kinds)
        raise TypeError(f'{name} must be {demand}, got {value!r} of type {type(value).__name__}')
    if get_origin(kind) is Annotated:
        _, limits = get_args(kind)
        if value not in limits:
            raise ValueError(f'{name} must {limits.demand}, got {value!r}')
    elif _base(kind) is Sequence:
        hints = get_args(kind)
        if get_origin(kind) is tuple and len(value) != len(hints):
            raise ValueError(f'{name} must have {len(hints)} entries, got {value!r}')
        for i, entry in enumerate(value if hints else ()):
            check_value(f'{name}[{i}]', entry, hints[0])


def _base(kind: Any) -> Any:
    """Key of `KINDS`: Annotated[int, ...] -> int, list[dict] and tuple[...] -> Sequence."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    base = get_origin(kind) or kind
    return Sequence if base in (list, tuple, Sequence) else base


def _is(value: Any, base: Any) -> bool:
    """Whether a value is of a kind of `KINDS`: bool is no number, and strings and dicts are no lists."""
    if base is Sequence and isinstance(value, (str, Mapping)):
        return False
    return isinstance(value, KINDS[base][0]) and (base is bool or not isinstance(value, bool))
