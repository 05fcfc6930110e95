"""The benchmark of TerminateOnNonFiniteHook."""

import benchmark_hook
from tool_runs import refuse

from swinv2_mm.engine import TerminateOnNonFiniteHook


def test_each_step_is_checked(monkeypatch, capsys):
    checked = []
    total = TerminateOnNonFiniteHook._total
    monkeypatch.setattr(TerminateOnNonFiniteHook, '_total', lambda self, loss: checked.append(1) or total(self, loss))
    benchmark_hook.main(['--shape', 'nano', '--rounds', '3'])
    assert len(checked) == 2 + 3  # two rounds warm up
    cells = capsys.readouterr().out.splitlines()[-1].strip('| ').split(' | ')
    assert cells[0] == 'nano'
    assert all(float(cell) > 0 for cell in cells[1:4])


def test_rounds_are_checked(tmp_path):
    line = 'error: --rounds must be at least 1, got 0'
    assert refuse(tmp_path, benchmark_hook.__file__, '--rounds', '0') == line
