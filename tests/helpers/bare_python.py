"""Run code in an interpreter that has not imported this package, for tests of imports.

It is forked from one that has imported torch, mmengine and mmcv, which takes seconds in a new interpreter.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

# Code that makes OpenMMLab unimportable. Prepend it to other code, or write it to a sitecustomize.py on PYTHONPATH.
WITHOUT_OPENMMLAB = """
import sys

PACKAGES = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmaction', 'mmpretrain'}


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.split('.')[0] in PACKAGES else self.finder.find_spec(name, *args)

    def __getattr__(self, name):  # for importlib.metadata
        return getattr(self.finder, name)


sys.meta_path[:] = map(Without, sys.meta_path)
for name in [name for name in sys.modules if name.split('.')[0] in PACKAGES]:
    del sys.modules[name]
"""


def run_python(code: str, *args: str | Path, cwd: str | Path = '/', path: tuple = ()) -> subprocess.CompletedProcess:
    """Like `python -c CODE ARGS` with `path` in PYTHONPATH; mmcv, mmengine and torch are already imported."""
    with tempfile.TemporaryDirectory(prefix='bare') as folder:
        request = dict(code=code, argv=['-c', *map(str, args)], cwd=str(cwd), path=[str(p) for p in path])
        status = _ask(json.dumps(request | dict(environment=dict(os.environ), folder=folder)))
        out, err = (Path(folder, name).read_text(errors='replace') for name in ('out', 'err'))
    return subprocess.CompletedProcess(request['argv'], status, out, err)


def _ask(request: str) -> int:
    """The exit status of a request. A server that does not answer is killed, and the next request starts a new one."""
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
    """The process to fork from. It ends with this process, which keeps its stdin open."""
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd='/'
    )


def serve() -> None:
    """Execute requests from stdin one by one."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # prints of imports must not look like answers
    import mmcv  # noqa: F401
    import mmengine  # noqa: F401
    import torch  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _execute(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def exit_code(end: SystemExit) -> int:
    """The exit code as in Python: a number is the code; anything else is printed, and the code is 1."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _execute(code: str, argv: list[str], cwd: str, path: list[str], environment: dict[str, str], folder: str) -> None:
    """Run the code in the forked child, and exit."""
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
