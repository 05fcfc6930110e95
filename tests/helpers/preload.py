"""Imports of the fork server, which its forked processes then share."""

import contextlib
import importlib
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch is imported

import mmengine.config.config
import torch

import swinv2_mm
import swinv2_mm.cli.launch
import swinv2_mm.models  # noqa: F401

for toolbox in ('mmdet', 'mmseg', 'mmaction'):
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(f'{toolbox}.utils').register_all_modules(init_default_scope=False)

mmengine.config.config.FormatCode = lambda text, **_: (text, True)  # see conftest.py
torch.set_num_threads(1)
