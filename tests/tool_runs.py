"""The command line tools: called in this process, in several processes, and as users run them."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from processes import run_processes

REPOSITORY = Path(__file__).parents[1]
TOOLS = REPOSITORY / 'tools'


@functools.cache
def load_tool(path: Path) -> ModuleType:
    """Import a tool, under a name that is no other module's, once."""
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


def call(folder: Path, script: str, *args) -> str:
    """Call a tool's `main` in this process, in a folder that is not the repository's; returns what it prints.

    The fixtures of conftest.py take back what it changes. Use it for whatever a tool does; once for each tool, use
    `run`, which starts a process as a user does.
    """
    main = load_tool(TOOLS / script).main
    printed = io.StringIO()
    former = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = main([str(arg) for arg in args])
    finally:
        os.chdir(former)
    assert not status, printed.getvalue()[-3000:]
    return printed.getvalue()


def call_together(folder: Path, script: str, *args, processes: int = 2, **env: str) -> str:
    """Call a tool's `main` in several processes, as dist_train.sh and dist_test.sh do; returns what they print."""
    arguments = [str(arg) for arg in args] + ['--launcher', 'pytorch']
    return run_processes(_main, TOOLS / script, arguments, processes=processes, folder=folder, **env)


def _main(script: Path, arguments: list[str]) -> None:
    load_tool(script).main(arguments)


def make_shapes(folder: Path, train: int, val: int, size: int, seed: int = 0) -> None:
    """Write images of shapes in COCO's layout."""
    options = dict(train=train, val=val, size=size, seed=seed)
    call(folder.parent, 'misc/make_shapes_coco.py', folder, *(f'--{name}={value}' for name, value in options.items()))


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
