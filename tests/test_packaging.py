"""The wheel, built and installed outside the repository."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from nora_diffusion import __version__
from nora_diffusion.config import shipped_configs

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what a clone holds, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(
        listing, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(out), str(source)], check=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory) -> Path:
    """``nora-dreambooth`` in an environment with the wheel and what it declares, and no more."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "--disable-pip-version-check", *constraints, str(wheel)], check=True)
    return folder / "bin" / "nora-dreambooth"


def run(command: Path, cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """The installed command, away from the checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(command), *argv], cwd=cwd, capture_output=True, text=True, env=environment
    )


def test_everything_a_user_needs_travels_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"nora_diffusion/configs/{name}.toml" for name in shipped_configs()} <= names
    recipes = (ROOT / "configs" / "recipes").glob("*.toml")
    assert {f"nora_diffusion/configs/recipes/{path.name}" for path in recipes} <= names
    source = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "nora_diffusion").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert source <= names
    tops = {name.split("/")[0] for name in names}
    assert tops - {f"nora_diffusion-{__version__}.dist-info", "webui"} == {"nora_diffusion"}


def test_the_installed_command_knows_the_shipped_configs(command, tmp_path):
    photos = ROOT / "sample_data" / "subject"
    done = run(command, tmp_path, "mini", "--data.subject", str(photos), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout)["model"]["base"] == "mini"


@pytest.mark.skipif(
    not (ROOT / "nora_diffusion/assets/mini").is_dir(), reason="the checkout has no mini weights"
)
def test_the_installed_command_trains_mini(command, tmp_path):
    photos = ROOT / "sample_data" / "subject"
    brief = ["--train.steps", "2", "--sample.n", "1", "--sample.steps", "2"]
    done = run(command, tmp_path, "mini", "--data.subject", str(photos), *brief)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mini" / "adapter.safetensors").is_file()
