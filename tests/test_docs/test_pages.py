"""The README and the docs: their commands are those of the tools, their code is valid, their links lead somewhere."""

import argparse
import ast
import configparser
import contextlib
import importlib
import io
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from doc_pages import CODE, COMMANDS, FENCE, PAGES, blocks, script_call, without_variables
from tool_runs import REPOSITORY, load_tool, restored_process

INDENTED = re.compile(r'(?:(?<=\n\n)|\A)((?: {4}\S[^\n]*\n(?:\n(?= {4}))?)+)')
GAP = '…'  # for names and numbers in a message
SHELL = 'apt-get', 'cd', 'export', 'git', 'jupyter', 'mim', 'source', 'tensorboard'  # programs that are not ours


# ---------------------------------------------------------------- form


def test_blocks_name_their_language():
    """Else nothing below would look at them."""
    for page in PAGES:
        text = page.read_text()
        assert {language for _, language, _ in FENCE.findall(text)} <= {'bash', 'python', 'console', 'text'}, page
        outside = FENCE.sub('', text)
        assert not INDENTED.search(outside), f'{page}: {INDENTED.search(outside)[0]}'


def test_lines_of_docs_end_at_120_columns():
    for page in PAGES:
        prose = re.sub(r'^\|.*$', '', FENCE.sub('', page.read_text()), flags=re.MULTILINE)
        long = [line for line in prose.splitlines() if len(line) > 120 and not re.search(r'https?://\S{60}', line)]
        assert not long, f'{page}: {long[0]}'


def test_the_readme_has_at_most_700_words():
    prose = re.sub(r'^\|.*$', '', FENCE.sub('', (REPOSITORY / 'README.md').read_text()), flags=re.MULTILINE)
    assert 100 < len(prose.split()) <= 700


def anchor(title: str) -> str:
    """The anchor that GitHub and Python-Markdown give a title."""
    return re.sub(r'[^\w\- ]', '', title.lower()).strip().replace(' ', '-')


def test_links_lead_to_files_and_titles():
    for page in PAGES:
        for target in re.findall(r'\]\(([^)\s]+)\)', FENCE.sub('', page.read_text())):
            if '://' in target or target.startswith('mailto:'):
                continue
            name, _, title = target.partition('#')
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f'{page}: {target}'
            if title:
                titles = re.findall(r'^#+ (.*)$', FENCE.sub('', path.read_text()), re.MULTILINE)
                assert title in map(anchor, titles), f'{page}: {target}'


def test_files_named_in_the_text_exist():
    folders = 'benchmarks|configs|demo|docs|projects|requirements|swinv2_mm|tests|tools'
    for page in PAGES:
        for name in re.findall(rf'`((?:{folders})/[\w./-]*)`', FENCE.sub('', page.read_text())):
            # the tuning of the kernels writes tiles.json
            assert name.endswith('/tiles.json') or (REPOSITORY / name).exists(), f'{page}: {name}'


# ---------------------------------------------------------------- error messages


def strings(path: Path) -> list[str]:
    """All texts of a module, with a gap for each value that is formatted into one."""

    def join(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return ''.join(map(join, node.values))
        if isinstance(node, ast.BinOp):
            return join(node.left) + join(node.right)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else GAP

    return [join(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.expr)]


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = (REPOSITORY / 'docs/troubleshooting.md').read_text().split('## Messages of other packages')[0]
    messages = re.findall(r'^### `(.*)`$', page, re.MULTILINE)
    files = [path for folder in ('swinv2_mm', 'tools') for path in (REPOSITORY / folder).rglob('*.py')]
    known = '\n'.join(text for path in files for text in strings(path) if text != GAP)
    gone = [m for m in messages if not re.search('.*'.join(map(re.escape, m.split(GAP))), known)]
    assert messages
    assert not gone, f'no code has these messages any more: {gone}'


# ---------------------------------------------------------------- commands


class ParsedError(Exception):
    """A tool has read its arguments, and need not go on."""


def parse(script: Path, arguments: list[str]) -> None:
    """Let a script read its arguments, and do no more."""
    parse_with(lambda: load_tool(script).main(arguments), script.name)


def parse_with(main: Callable[[], object], name: str) -> None:
    """Call `main` until it has read its arguments."""
    real = argparse.ArgumentParser.parse_known_args

    def parse_known_args(parser, args=None, namespace=None):
        namespace, others = real(parser, args, namespace)
        unknown = [other for other in others if other.startswith('--') and not other.startswith('--cfg-options')]
        assert not unknown, f'{name} does not know {unknown}'
        raise ParsedError

    errors = io.StringIO()
    stop = mock.patch.object(argparse.ArgumentParser, 'parse_known_args', parse_known_args)
    with stop, restored_process(), contextlib.redirect_stderr(errors), pytest.raises((ParsedError, SystemExit)) as end:
        main()
    assert end.type is ParsedError, errors.getvalue()


def check(words: list[str]) -> None:
    """Hold one command against what it calls."""
    program, *arguments = without_variables(words)
    if program in SHELL:
        return
    if program == 'make':
        makefile = (REPOSITORY / 'Makefile').read_text()
        targets = [word for word in arguments if '=' not in word]
        assert set(targets) <= set(re.search(r'\.PHONY: (.*)', makefile)[1].split())
    elif program == 'pip':
        config = configparser.ConfigParser()
        config.read(REPOSITORY / 'setup.cfg')
        for extras in re.findall(r'\[([\w,]+)\]', ' '.join(arguments)):
            assert set(extras.split(',')) <= set(config['options.extras_require'])
    elif program == 'python' and arguments[0] == '-m':
        module = importlib.import_module(arguments[1])
        parse_with(lambda: module.main(arguments[2:]), arguments[1])
    elif program == 'python' and arguments[0] == '-c':
        ast.parse(arguments[1])
    elif program == 'benchmarks/gpu_run.sh':
        assert os.access(REPOSITORY / program, os.X_OK)
        assert re.fullmatch(r'\S+( [1-5])?', ' '.join(arguments))
    else:
        if program not in ('python', 'torchrun'):
            assert os.access(REPOSITORY / program, os.X_OK), f'{program} is no program of ours'
        script, *arguments = script_call(words)
        parse(REPOSITORY / script, arguments)


@pytest.mark.parametrize(('page', 'command'), COMMANDS)
def test_a_command_is_one_that_exists(page, command):
    for words in re.split(r' (?:&&|\|) ', command):
        words = shlex.split(words, comments=True)
        check(words)
        configs = [word for word in words if word.startswith(('configs/', 'docs/', 'demo/')) and '*' not in word]
        assert all((REPOSITORY / word).parent.is_dir() for word in configs)
        assert all((REPOSITORY / word).exists() for word in configs if word.endswith('.py'))


# ---------------------------------------------------------------- code


@pytest.mark.parametrize(('page', 'number'), CODE)
def test_code_is_valid(page, number):
    ast.parse(blocks(REPOSITORY / page, 'python')[number])
