"""The wheel, built and installed outside the repository."""

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
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True)
    return folder


def run(installed: Path, cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """``nora-dreambooth`` of the installed wheel."""
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import nora_diffusion.cli as cli; "
        f"assert cli.__file__.startswith({str(installed)!r}); sys.exit(cli.main_dreambooth())"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", code, *argv], cwd=cwd, capture_output=True, text=True
    )


def test_everything_a_user_needs_travels_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"nora_diffusion/configs/{name}.toml" for name in shipped_configs()} <= names
    source = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "nora_diffusion").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert source <= names
    tops = {name.split("/")[0] for name in names}
    assert tops - {f"nora_diffusion-{__version__}.dist-info", "webui"} == {"nora_diffusion"}


def test_the_installed_command_knows_the_shipped_configs(installed, tmp_path):
    photos = ROOT / "sample_data" / "subject"
    done = run(installed, tmp_path, "mini", "--data.subject", str(photos), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout)["model"]["base"] == "mini"


@pytest.mark.skipif(
    not (ROOT / "nora_diffusion/assets/mini").is_dir(), reason="the checkout has no mini weights"
)
def test_the_installed_command_trains_mini(installed, tmp_path):
    photos = ROOT / "sample_data" / "subject"
    brief = ["--train.steps", "2", "--sample.n", "1", "--sample.steps", "2"]
    done = run(installed, tmp_path, "mini", "--data.subject", str(photos), *brief)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mini" / "adapter.safetensors").is_file()
