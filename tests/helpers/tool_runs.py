"""Run the command line tools: in this process, in several processes, and as users run them."""

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
import pytest
import torch
from mmengine.utils import ManagerMixin
from processes import run_processes

REPOSITORY = Path(__file__).parents[2]
TOOLS, BENCHMARKS = REPOSITORY / 'tools', REPOSITORY / 'benchmarks'
HELPERS = Path(__file__).parent
DISTRIBUTED = (
    'NNODES',
    'NODE_RANK',
    'MASTER_ADDR',
    'MASTER_PORT',
    'PORT',
    'RANK',
    'LOCAL_RANK',
    'WORLD_SIZE',
    'LOCAL_WORLD_SIZE',
)


@functools.cache
def load_tool(path: Path) -> ModuleType:
    """Import a tool once, under a unique module name."""
    spec = importlib.util.spec_from_file_location(f'tool_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by its name
    with folder_on_path(path):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def folder_on_path(path: Path):
    """Put the folder of a script on `sys.path`, as Python does when it runs the script."""
    sys.path.insert(0, str(path.parent))
    try:
        yield
    finally:
        sys.path.remove(str(path.parent))


# ---------------------------------------------------------------- state of the process


def managers(base: type = ManagerMixin):
    """The classes of which mmengine keeps named instances: loggers, scopes, visualizers."""
    for manager in base.__subclasses__():
        yield manager
        yield from managers(manager)


@contextlib.contextmanager
def restored_process():
    """Restore the state of the process that a Runner or a tool's `main` changes."""
    instances = {manager: manager._instance_dict.copy() for manager in managers()}
    environment, folder, argv, threads = dict(os.environ), os.getcwd(), sys.argv, torch.get_num_threads()
    deterministic, paths = torch.are_deterministic_algorithms_enabled(), sys.path.copy()
    try:
        yield
    finally:
        for manager in managers():
            kept = instances.get(manager, {})
            manager._instance_dict.clear()
            manager._instance_dict.update(kept)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = argv
        sys.path[:] = paths  # subprocesses inherit it, and would import the torchvision of the peers
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


# ---------------------------------------------------------------- processes


def free_port():
    """A port on which no program listens."""
    with socket.socket() as probe:
        probe.bind(('', 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def taken_port(port: int = 0):
    """Listen on a port, or on any free one; the port may be in use already."""
    with socket.socket() as holder:
        with contextlib.suppress(OSError):
            holder.bind(('', port))
            holder.listen()
        yield port or holder.getsockname()[1]


def command(script, *args):
    """Program and arguments that start a tool."""
    script = str(TOOLS / script)
    return [script] if script.endswith('.sh') else [sys.executable, script], list(map(str, args))


def environment(**more):
    """Environment variables for a subprocess, without those of a distributed run that this process may be part of."""
    ours = {name: value for name, value in os.environ.items() if name not in DISTRIBUTED}
    return {**ours, 'PYTHON': sys.executable, **more}


def call(folder: Path, script: str | Path, *args) -> str:
    """Call the `main` of a script in this process, outside of the repository; returns its output.

    `script` is a path below `tools/`, or an absolute one. The state of the process is restored. Use `run` once for each
    tool, which starts a process as a user does, and `call` for all else.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = _call(folder, script, args)
    except SystemExit as end:
        status = end.code
    assert not status, printed.getvalue()[-3000:]
    return printed.getvalue()


def _call(folder: Path, script: str | Path, args: tuple) -> int | None:
    main = load_tool(TOOLS / script).main
    # without `restored_process`, a later run in the same second would reuse the loggers of this one
    with restored_process(), folder_on_path(TOOLS / script):
        os.chdir(folder)
        return main([str(arg) for arg in args])


def refuse(folder: Path, script: str | Path, *args) -> str:
    """Call a tool's `main` with invalid arguments; it must exit with code 2 and print one line, which is returned."""
    errors = io.StringIO()
    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(errors):
        _call(folder, script, args)
    assert end.value.code == 2, errors.getvalue()[-3000:]
    lines = errors.getvalue().strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith('error: ')
    return lines[0]


def call_together(folder: Path, script: str, *args, processes: int = 2, **env: str) -> str:
    """Call a tool's `main` in several processes, as dist_train.sh and dist_test.sh do; returns their output."""
    arguments = [str(arg) for arg in args] + ['--launcher', 'pytorch']
    return run_processes(_main, TOOLS / script, arguments, processes=processes, folder=folder, **env)


def _main(script: Path, arguments: list[str]) -> None:
    load_tool(script).main(arguments)


def make_shapes(folder: Path, train: int, val: int, size: int, seed: int = 0) -> None:
    """Write images of shapes in COCO's layout."""
    options = dict(train=train, val=val, size=size, seed=seed)
    call(folder.parent, 'misc/make_shapes_coco.py', folder, *(f'--{name}={value}' for name, value in options.items()))


def run(folder, script, *args, **env):
    """Run a tool in a process, outside of the repository; returns its output."""
    program, args = command(script, *args)
    result = subprocess.run(
        [*program, *args], cwd=folder, env=environment(**env), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def metrics(folder: Path) -> dict:
    """The metrics that a test has logged."""
    return json.loads(max(folder.glob('20*/*.json')).read_text().splitlines()[-1])


def check_training(folder: Path) -> None:
    """Assert that a training has logged losses, all of them finite."""
    losses = [json.loads(line) for line in max(folder.glob('20*/vis_data/scalars.json')).open()]
    losses = [line['loss'] for line in losses if 'loss' in line]
    assert losses
    assert np.isfinite(losses).all()
