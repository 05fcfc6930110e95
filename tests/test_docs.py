"""The manual follows the code: messages of the troubleshooting page are those of the code, links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = [*REPOSITORY.glob('*.md'), *REPOSITORY.glob('docs/*.md'), REPOSITORY / 'tools/README.md']
GAP = '…'  # for names and numbers in a message


def strings(path: Path) -> list[str]:
    """All texts of a module, with a gap for each value that is formatted into one."""

    def join(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return ''.join(map(join, node.values))
        if isinstance(node, ast.BinOp):
            return join(node.left) + join(node.right)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else GAP

    return [join(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.expr)]


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    page = (REPOSITORY / 'docs/troubleshooting.md').read_text().split('## Messages of other packages')[0]
    messages = re.findall(r'^### `(.*)`$', page, re.MULTILINE)
    files = [path for folder in ('swinv2_mm', 'tools') for path in (REPOSITORY / folder).rglob('*.py')]
    known = '\n'.join(text for path in files for text in strings(path) if text != GAP)
    gone = [m for m in messages if not re.search('.*'.join(map(re.escape, m.split(GAP))), known)]
    assert messages
    assert not gone, f'no code has these messages any more: {gone}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_of_the_manual_lead_to_files_and_headings(page):
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if '://' in target:
            continue
        name, _, anchor = target.partition('#')
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor and path.suffix == '.md':
            headings = re.findall(r'^#+ (.*)$', path.read_text(), re.MULTILINE)
            slugs = {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}
            assert anchor in slugs, target
