"""What mmengine expects of every package that it can resolve by name, and nothing else."""

import importlib


def register_all_modules(init_default_scope: bool = True) -> None:
    """Register everything of this package, as `mmengine.hub.get_model` asks for.

    Args:
        init_default_scope: Ignored: the default scope stays that of the toolbox, since this package has no models,
            data sets or loops of its own.
    """
    for module in ('swinv2_mm.models', 'swinv2_mm.engine'):
        importlib.import_module(module)
