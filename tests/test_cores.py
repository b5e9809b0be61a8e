"""Commands share the machine: their waiting threads give way to other programs."""

import os
import subprocess
import sys

import pytest

from nora_diffusion.cores import SPINS

SHOW = """
import os, sys
from nora_diffusion import cli
def show(argv):
    spins, policy = map(os.environ.get, ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"))
    print("torch" in sys.modules, spins, policy)
    return 0
raise SystemExit(cli._guard("nora", show, []))
"""


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, f"False {SPINS} None"),
        ({"GOMP_SPINCOUNT": "7"}, "False 7 None"),
        ({"OMP_WAIT_POLICY": "active"}, "False None active"),
    ],
)
def test_a_command_says_how_its_threads_wait_before_torch_is_imported(given, found):
    """Torch reads it once, at its import; what the user has set stays."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    said = subprocess.run(
        [sys.executable, "-c", SHOW], env=environment | given, capture_output=True, text=True
    )
    assert said.stdout.strip() == found, said.stderr
