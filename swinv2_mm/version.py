"""Version of this package, and minimum versions of its dependencies."""

import importlib
import importlib.util

__version__ = '0.1.0'

MINIMUM = {'torch': '2.0', 'mmengine': '0.10.0', 'mmcv': '2.0.0'}
HAS_OPENMMLAB = any(importlib.util.find_spec(name) for name in ('mmengine', 'mmcv'))


def check_dependencies() -> None:
    """Raise an ImportError that names each package that is missing or too old, and how to install it.

    They are not declared as install requirements, because their builds differ: by CUDA version, by prebuilt wheels, or
    under other distribution names.
    """
    wrong = []
    for name, minimum in MINIMUM.items():
        try:
            found = importlib.import_module(name).__version__
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            wrong.append(f'{name}>={minimum} (not installed)')
            continue
        if _release(found) < _release(minimum):
            wrong.append(f'{name}>={minimum} (found {found})')
    if wrong:
        raise ImportError(
            f'swinv2_mm {__version__} needs {", ".join(wrong)}. Install torch from https://pytorch.org, then '
            '`pip install -U openmim && mim install mmengine "mmcv>=2.0.0"`; or run `make setup` in the '
            'repository, which creates an environment with all of them.'
        )


def _release(version: str) -> tuple[int, ...]:
    numbers = version.split('+')[0].split('.')[:2]
    return tuple(int(''.join(filter(str.isdigit, n)) or 0) for n in numbers)
