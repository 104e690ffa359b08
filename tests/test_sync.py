"The committed package and notebooks are what nbdev would write."
import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_notebooks import ROOT, notebooks

@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "A copy of the repository, with `scan_nb` exported anew and the notebooks cleaned."
    tmp = tmp_path_factory.mktemp('repo')
    for name in ('settings.ini', 'README.md'): shutil.copy(ROOT/name, tmp)
    shutil.copytree(ROOT/'nbs', tmp/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    for cmd in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([str(Path(sys.executable).parent/cmd)], cwd=tmp, check=True)
    return tmp

def test_package_matches_notebooks(fresh):
    here, there = ({p.name for p in (d/'scan_nb').glob('*.py')} for d in (ROOT, fresh))
    assert here == there, f'orphan or missing modules: {here ^ there}'
    _, mismatch, errors = filecmp.cmpfiles(ROOT/'scan_nb', fresh/'scan_nb', here, shallow=False)
    assert not mismatch and not errors, f'run nbdev_export (or nbdev_update): {mismatch+errors}'

@pytest.mark.parametrize('path', notebooks(), ids=lambda p: p.stem)
def test_notebook_is_clean(fresh, path):
    assert path.read_text() == (fresh/path.relative_to(ROOT)).read_text(), 'run nbdev_clean'
