"""The module `utils` that mmengine expects in every package that it can resolve by name."""

import importlib


def register_all_modules(init_default_scope: bool = True) -> None:
    """Register the modules of this package; called by `mmengine.hub.get_model`.

    Args:
        init_default_scope: Ignored. The default scope stays that of the toolbox, because this package has no detectors,
            segmentors, recognizers or loops.
    """
    for module in ('swinv2_mm.models', 'swinv2_mm.engine'):
        importlib.import_module(module)
