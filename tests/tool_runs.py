"""The command line tools: as users run them, and as modules."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

REPOSITORY = Path(__file__).parents[1]
TOOLS = REPOSITORY / 'tools'


def load_tool(path: Path) -> ModuleType:
    """Import a tool, under a name that is no other module's."""
    spec = importlib.util.spec_from_file_location(f'tool_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by its name
    spec.loader.exec_module(module)
    return module


def free_port():
    with socket.socket() as probe:
        probe.bind(('', 0))
        return probe.getsockname()[1]


def command(script, *args):
    return [str(TOOLS / script)] if script.endswith('.sh') else [sys.executable, str(TOOLS / script)], list(
        map(str, args)
    )


def environment(**more):
    return {**os.environ, 'PYTHON': sys.executable, 'PORT': str(free_port()), **more}


def run(folder, script, *args, **env):
    """Run a tool in a folder that is not the repository's."""
    program, args = command(script, *args)
    result = subprocess.run(
        [*program, *args], cwd=folder, env=environment(**env), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def metrics(folder: Path) -> dict:
    """What a test has logged."""
    return json.loads(max(folder.glob('20*/*.json')).read_text().splitlines()[-1])


def check_training(folder: Path) -> None:
    """A training has logged losses, and all of them are finite."""
    losses = [json.loads(line) for line in max(folder.glob('20*/vis_data/scalars.json')).open()]
    losses = [line['loss'] for line in losses if 'loss' in line]
    assert losses
    assert np.isfinite(losses).all()
