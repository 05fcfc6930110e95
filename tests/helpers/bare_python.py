"""Run code in an interpreter that has not imported this package, for tests of imports.

It is forked from one that has imported torch, mmengine and mmcv: a new interpreter takes seconds for them.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

# Put before code, or into a file sitecustomize.py on PYTHONPATH: nothing of OpenMMLab can be imported after it.
WITHOUT_OPENMMLAB = """
import sys

PACKAGES = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmaction', 'mmpretrain'}


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.split('.')[0] in PACKAGES else self.finder.find_spec(name, *args)

    def __getattr__(self, name):  # what importlib.metadata asks for
        return getattr(self.finder, name)


sys.meta_path[:] = map(Without, sys.meta_path)
for name in [name for name in sys.modules if name.split('.')[0] in PACKAGES]:
    del sys.modules[name]
"""


def run_python(code: str, *args: str | Path, cwd: str | Path = '/', path: tuple = ()) -> subprocess.CompletedProcess:
    """As `python -c CODE ARGS`, with `path` in PYTHONPATH, and with mmcv, mmengine and torch imported already."""
    with tempfile.TemporaryDirectory(prefix='bare') as folder:
        request = dict(code=code, argv=['-c', *map(str, args)], cwd=str(cwd), path=[str(p) for p in path])
        status = _ask(json.dumps(request | dict(environment=dict(os.environ), folder=folder)))
        out, err = (Path(folder, name).read_text(errors='replace') for name in ('out', 'err'))
    return subprocess.CompletedProcess(request['argv'], status, out, err)


def _ask(request: str) -> int:
    """The status with which a request has ended; a process that did not answer is not asked again."""
    server = _server()
    try:
        server.stdin.write(request + '\n')
        server.stdin.flush()
        return int(server.stdout.readline())
    except BaseException:
        server.kill()
        _server.cache_clear()
        raise


@functools.cache
def _server() -> subprocess.Popen:
    """The process to fork from; it ends with this one, which keeps its input open."""
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd='/'
    )


def serve() -> None:
    """Carry out what comes in, one after the other."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # nothing that an import prints is an answer
    import mmcv  # noqa: F401
    import mmengine  # noqa: F401
    import torch  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _execute(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def exit_code(end: SystemExit) -> int:
    """As Python does: a number is the code; anything else is printed, and the code is 1."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _execute(code: str, argv: list[str], cwd: str, path: list[str], environment: dict[str, str], folder: str) -> None:
    """What the child does, and no more than that."""
    for name, stream in (('out', 1), ('err', 2)):
        os.dup2(os.open(f'{folder}/{name}', os.O_WRONLY | os.O_CREAT), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        sys.argv = argv
        sys.path[:1] = ['', *path]
        exec(compile(code, '<string>', 'exec'), dict(__name__='__main__'))
        status = 0
    except SystemExit as end:
        status = exit_code(end)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == '__main__':
    serve()
