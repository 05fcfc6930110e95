"""The pages of the manual (README, docs, READMEs of folders), with their commands and code blocks."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tool_runs import REPOSITORY

PAGES = sorted(
    page
    for pattern in ('*.md', 'docs/**/*.md', 'tools/*.md', 'configs/*/*.md', 'projects/*/*.md')
    for page in REPOSITORY.glob(pattern)
)
FENCE = re.compile(r'^( *)```(\w*)[^\n]*\n(.*?)^\1```', re.MULTILINE | re.DOTALL)
LAUNCHERS = {
    'dist_train.sh': 'train.py',
    'dist_test.sh': 'test.py',
    'slurm_train.sh': 'train.py',
    'slurm_test.sh': 'test.py',
}


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of a language, without their indentation."""
    return [
        '\n'.join(line.removeprefix(indent) for line in text.splitlines())
        for indent, found, text in FENCE.findall(page.read_text())
        if found == language
    ]


def commands(page: Path) -> Iterator[str]:
    """Commands of the bash blocks, each on one line."""
    for block in blocks(page, 'bash'):
        for line in block.replace('\\\n', ' ').splitlines():
            if shlex.split(line, comments=True):
                yield ' '.join(line.split())


def without_variables(words: list[str]) -> list[str]:
    """The words of a command after its assignments of environment variables."""
    return words[next(i for i, word in enumerate(words) if not re.fullmatch(r'\w+=.*', word)) :]


def script_call(words: list[str]) -> list[str]:
    """The script that a command runs, below the repository, and its arguments; launchers are resolved."""
    program, *arguments = without_variables(words)
    if program == 'torchrun':
        return arguments[next(i for i, word in enumerate(arguments) if word.endswith('.py')) :]
    if Path(program).name in LAUNCHERS:
        return [f'tools/{LAUNCHERS[Path(program).name]}', *launched(program, arguments)]
    return arguments if program == 'python' else [program, *arguments]


def launched(program: str, arguments: list[str]) -> list[str]:
    """Arguments that a launcher hands to train.py or test.py."""
    if 'slurm' in program:
        _, _, config, folder_or_checkpoint, *rest = arguments
        return [config, *(['--work-dir'] if 'train' in program else []), folder_or_checkpoint, *rest]
    gpus = arguments.pop(1 if 'train' in program else 2)
    assert gpus.isdecimal()
    return arguments


COMMANDS = [(page.relative_to(REPOSITORY).as_posix(), command) for page in PAGES for command in commands(page)]
CODE = [(page.relative_to(REPOSITORY).as_posix(), i) for page in PAGES for i in range(len(blocks(page, 'python')))]
