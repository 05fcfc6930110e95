"""The metafile of each folder of configs lists them all, except those of the demos."""

from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.mark.parametrize('folder', ['cls', 'det', 'seg', 'ssl', 'video'])
def test_the_metafile_lists_every_config(folder):
    metafile = yaml.safe_load((CONFIGS / folder / 'metafile.yml').read_text())
    configs = {path for path in (CONFIGS / folder).glob('*.py') if 'demo' not in path.stem}
    assert {CONFIGS.parent / model['Config'] for model in metafile['Models']} == configs
    assert [model['Name'] for model in metafile['Models']] == [Path(m['Config']).stem for m in metafile['Models']]
