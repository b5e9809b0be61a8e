"""PEFT's own tuner tests, all of them: `python scripts/peft_suite.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "peft_suite.py"


@pytest.mark.slow
def test_no_nora_case_of_pefts_tuner_tests_fails():
    result = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "failed" not in result.stdout.splitlines()[-1]
