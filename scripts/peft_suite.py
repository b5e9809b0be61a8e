"""Run PEFT's own tuner tests on NoRA.

    python scripts/peft_suite.py            all of them (about 700 cases)
    python scripts/peft_suite.py --quick    one configuration of each layer type, for CI

The tests are those of the sdist of the installed PEFT version, fetched from the package index and
kept in a cache folder; nothing of them is part of this repository. The matrices of
`test_custom_models.py` are replaced by NoRA configurations before pytest collects them, so every
test that a new method inherits by adding a row there runs here.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

PACKAGE = "peft_sdist_tests"
DEPENDENCIES = ("datasets", "parameterized", "scipy", "pytest")
MLP = ["lin0", "lin1"]
RANKS = {"r": 6, "inner_r": 3}
SINGLE = [
    ("Vanilla MLP 1 NoRA", "MLP", {"target_modules": "lin0"}),
    ("Vanilla MLP 2 NoRA", "MLP", {"target_modules": ["lin0"]}),
    ("Vanilla MLP 3 NoRA", "MLP", {"target_modules": MLP, "bias": "none", "seed": 1}),
    ("Vanilla MLP 4 NoRA", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Vanilla MLP 5 NoRA sigma", "MLP", {"target_modules": ["lin0"], "init": "sigma"}),
    ("Vanilla MLP 6 NoRA minor", "MLP", {"target_modules": ["lin0"], "basis": "weight_minor"}),
    ("Vanilla MLP 7 NoRA random", "MLP", {"target_modules": ["lin0"], "basis": "random"}),
    ("Vanilla MLP 8 NoRA timesteps", "MLP", {"target_modules": MLP, "timestep_rank": 1.0}),
    ("Embedding + transformers Conv1D NoRA", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Conv2d 1 NoRA", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d 2 NoRA", "Conv2d", {"target_modules": ["conv2d", "lin0"], "init": "sigma"}),
    ("Conv2d 3 NoRA 1x1", "Conv2d1x1", {"target_modules": ["conv2d"]}),
]
QUICK = [SINGLE[2], SINGLE[8], SINGLE[10]]
PAIRS = [
    ("NoRA Same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("NoRA Different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
]
EXPECTED_CASES = {False: 650, True: 180}


class NoraCases:
    """Pytest plugin: put NoRA configurations into PEFT's matrices, and count the outcomes."""

    def __init__(self, quick: bool):
        self.quick = quick
        self.outcomes: Counter[str] = Counter()

    def pytest_sessionstart(self) -> None:
        """Replace the rows of PEFT's matrices before the tests are collected."""
        from nora_diffusion.adapter import NoraConfig

        module = importlib.import_module(f"{PACKAGE}.test_custom_models")
        rows = QUICK if self.quick else SINGLE
        # In place: the decorators of the test classes hold these very lists.
        module.TEST_CASES[:] = [
            (name, model, NoraConfig, {**kwargs, **RANKS}) for name, model, kwargs in rows
        ]
        module.ALL_PEFT_CONFIG_CLASSES[:] = [NoraConfig]
        not_identity = {"init_weights": False, **RANKS}
        module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
            (name, "nora", NoraConfig, {**first, **not_identity}, {**second, **not_identity})
            for name, first, second in PAIRS
        ]

    def pytest_collection_modifyitems(self, config, items) -> None:
        """Keep the tests that a matrix feeds."""
        # What the matrices do not reach tests other methods, some of them with models of the hub.
        ours = [item for item in items if "NoRA" in item.name or "NoraConfig" in item.name]
        config.hook.pytest_deselected(items=[item for item in items if item not in ours])
        items[:] = ours

    def pytest_runtest_logreport(self, report) -> None:
        """Count what happened to each case."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1


def fetch_tests(cache: Path) -> Path:
    """Return a folder that holds the tests of the installed PEFT version as a package."""
    version = importlib.metadata.version("peft")
    root = cache / f"peft-{version}"
    if not (root / PACKAGE / "__init__.py").is_file():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            pip("download", "--no-deps", "--no-binary", ":all:", "-d", folder, f"peft=={version}")
            (sdist,) = Path(folder).glob("*.tar.gz")
            with tarfile.open(sdist) as archive:
                archive.extractall(folder, filter="data")
            (tests,) = Path(folder).glob("*/tests")
            # The sdist leaves out the file that makes its tests a package; the imports need one.
            (tests / "__init__.py").touch()
            root.mkdir(exist_ok=True)
            tests.rename(root / PACKAGE)
    return root


def install_dependencies() -> None:
    missing = [name for name in DEPENDENCIES if importlib.util.find_spec(name) is None]
    if missing:
        pip("install", *missing)


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 configurations, not 12")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument(
        "--cache",
        type=Path,
        default=user_cache / "nora" / "peft-suite",
        help="where the sdist is kept (default: %(default)s)",
    )
    options, pytest_arguments = parser.parse_known_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    install_dependencies()
    root = fetch_tests(options.cache)

    # Before torch and the hub client are imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(root), str(Path(__file__).resolve().parents[1])]
    with tempfile.TemporaryDirectory() as factors:
        os.environ["NORA_CACHE_DIR"] = factors
        return run(root, options.quick, pytest_arguments)


def run(root: Path, quick: bool, pytest_arguments: list[str]) -> int:
    import pytest

    cases = NoraCases(quick)
    status = pytest.main(
        [
            str(root / PACKAGE / "test_custom_models.py"),
            *("-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider"),
            *("-q", "-W", "ignore"),
            *pytest_arguments,
        ],
        plugins=[cases],
    )
    counts = ", ".join(f"{count} {name}" for name, count in sorted(cases.outcomes.items()))
    print(f"NoRA in PEFT's tuner tests: {counts}")
    if cases.outcomes["passed"] < EXPECTED_CASES[quick] and not pytest_arguments:
        print(f"expected at least {EXPECTED_CASES[quick]} passing cases; was the matrix replaced?")
        return 1
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
