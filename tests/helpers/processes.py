"""Run a function in several processes of a gloo group, forked from a server that has imported everything.

The group is initialised through a file and needs no port. Tests of torchrun start torchrun itself.
"""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import peer_packages
import torch
from bare_python import exit_code

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['preload'])


class ProcessError(AssertionError):
    """A process has failed; `log` is the output of all processes."""

    def __init__(self, code: int, log: str):
        super().__init__(f'a process ended with code {code}:\n{log[-3000:]}')
        self.code, self.log = code, log


def run_processes(target: Callable, *args, processes: int = 2, folder: Path, **env: str) -> str:
    """Call `target(*args)` in several processes of a gloo group; returns their output.

    Args:
        target: A function of an importable module.
        args: Picklable arguments.
        processes: Their number; a single process has a process group too.
        folder: Working directory.
        env: Environment variables besides those of torchrun.

    Raises:
        ProcessError: A process failed; the others are killed.
    """
    start_server()
    with tempfile.TemporaryDirectory(prefix='meet') as meet:
        log = Path(meet, 'log')
        started = []
        for rank in range(processes):
            place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
            variables = {name: str(value) for name, value in {**os.environ, **env, **place}.items()}
            process = CONTEXT.Process(target=_enter, args=(target, args, str(folder), variables, meet))
            process.start()
            started.append(process)
        try:
            code = _join(started)
        finally:  # no process outlives the test
            for process in started:
                process.kill()
                process.join()
        printed = log.read_text(errors='replace')
    if code:
        raise ProcessError(code, printed)
    return printed


def start_server() -> None:
    """Start the server once. Before Python 3.13 it does not inherit `sys.path`, so PYTHONPATH names this folder."""
    former = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parent), *([former] if former else [])])
    try:
        forkserver.ensure_running()
    finally:
        if former is None:
            del os.environ['PYTHONPATH']
        else:
            os.environ['PYTHONPATH'] = former


def _join(processes: list) -> int:
    """Wait until all have ended or one has failed; returns the first exit code other than 0."""
    running = list(processes)
    while running:
        wait([process.sentinel for process in running])
        failed = [process for process in running if process.exitcode]
        if failed:
            return failed[0].exitcode
        running = [process for process in running if process.exitcode is None]
    return 0


def _enter(target: Callable, args: tuple, folder: str, variables: dict[str, str], meet: str) -> None:
    """Join the group and call the function, in a forked process."""
    log = os.open(f'{meet}/log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    # an earlier test may have added the folder of the peers, from which mmengine would import torchvision
    sys.path[:] = [path for path in sys.path if path != peer_packages.FOLDER]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    code = 1
    try:
        assert 'preload' in sys.modules, 'each process would import everything itself'
        torch.distributed.init_process_group(
            'gloo',
            init_method=f'file://{meet}/store',
            rank=int(variables['RANK']),
            world_size=int(variables['WORLD_SIZE']),
            timeout=timedelta(minutes=10),
        )
        target(*args)
        torch.distributed.barrier()
        code = 0
    except SystemExit as end:
        code = exit_code(end)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)  # skips the teardown of gloo's threads, which sometimes aborts the process
