"""Importing train_gpt starts nothing and needs nothing but torch and numpy."""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def test_import_from_any_directory_prints_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); import train_gpt; assert 'sentencepiece' not in sys.modules"
    environ = {"PATH": os.environ["PATH"], "RECIPE": "no such recipe"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
