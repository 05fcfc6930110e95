"""The command line tools, as users run them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[1]


def run(script: str, *arguments: object, cwd: Path) -> str:
    program = 'bash' if script.endswith('.sh') else sys.executable
    command = [program, str(REPOSITORY / 'tools' / script), *map(str, arguments)]
    with socket.socket() as probe:
        probe.bind(('', 0))
        env = os.environ | dict(PYTHON=sys.executable, PORT=str(probe.getsockname()[1]))
    result = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def metrics(folder: Path) -> dict:
    return json.loads(max(folder.glob('20*/*.json')).read_text().splitlines()[-1])


def check_training(folder: Path) -> None:
    losses = [json.loads(line) for line in max(folder.glob('20*/vis_data/scalars.json')).open()]
    losses = [line['loss'] for line in losses if 'loss' in line]
    assert losses
    assert np.isfinite(losses).all()
