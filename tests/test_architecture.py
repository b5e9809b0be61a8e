"""Who may import whom, what stays free of torch, and what nobody may call."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = [name for name in ("nora_diffusion", "webui") if (ROOT / name).is_dir()]

BASE = {
    "nora_diffusion",
    "cores",
    "disk",
    "schema",
    "settings",
    "presets",
    "run_config",
    "config",
    "events",
    "run_folder",
}
"""What everyone may import; of these, the package itself is only its version and lazy names."""

MAY_IMPORT = {
    "nora_diffusion": {"adapter", "denoiser_hooks", "families"},  # for type checkers only
    "cores": set(),
    "disk": set(),
    "schema": set(),
    "settings": {"schema"},
    "subjects": {"schema"},
    "presets": {"settings"},
    "sections": {"schema"},
    "run_config": {"disk", "presets", "schema", "settings"},
    "run_folder": {"disk", "events", "run_config", "settings"},
    "run_command": BASE | {"train.processes"},
    "language_config": {"schema", "sections"},
    "language_model": BASE | {"adapter", "families", "language_config"},
    "language_command": BASE
    | {"evaluation", "families", "language_config", "language_model", "run_command", "train"},
    "vision_language_config": {"schema", "sections"},
    "config": {"presets", "run_config", "schema", "sections", "settings", "subjects"},
    "events": {"disk"},
    "adapter.factor_cache": set(),
    "adapter.factors": {"adapter.factor_cache"},
    "adapter": {"nora_diffusion", "adapter", "disk"},
    "families.objective": set(),
    "families": BASE | {"families"},
    "data.buckets": BASE,
    "data.captions": BASE,
    "data.masks": BASE,
    "data.quality": set(),
    "data.images": BASE | {"data.captions", "data.masks", "data.quality"},
    "data.dataset": BASE | {"data.images", "data.buckets", "data.masks"},
    "data": BASE | {"data"},
    "denoiser_hooks": BASE | {"adapter"},
    "sampling": BASE | {"adapter", "families", "denoiser_hooks"},
    "targets": BASE | {"adapter", "families", "language_config", "vision_language_config"},
    "planning": BASE | {"adapter", "families", "planning", "targets", "train"},
    "sheets": set(),
    "evaluation": BASE
    | {"adapter", "families", "denoiser_hooks", "sampling", "sheets", "data", "evaluation"},
    "train": BASE
    | {
        "adapter",
        "families",
        "denoiser_hooks",
        "sampling",
        "sheets",
        "data",
        "evaluation",
        "train",
        "language_config",
        "vision_language_config",
    },
    "train.trainer": BASE
    | {"adapter", "language_config", "vision_language_config", "run_command", "train"},
    "train.vision_language": BASE
    | {"adapter", "data", "evaluation", "families", "vision_language_config", "run_command"}
    | {"train"},
    "train.language": BASE
    | {"adapter", "data", "evaluation", "families", "language_config", "language_model"}
    | {"run_command", "train"},
    "campaign": BASE | {"data", "campaign"},
    "mini": BASE | {"families", "evaluation", "data", "mini"},
    "bench": BASE
    | {"adapter", "bench", "denoiser_hooks", "evaluation", "families", "mini", "sampling", "train"},
    "command_line": BASE | {"bench"},
    "commands": BASE
    | {
        "command_line",
        "adapter",
        "families",
        "denoiser_hooks",
        "sampling",
        "targets",
        "planning",
        "data",
        "evaluation",
        "train",
        "campaign",
        "bench",
        "run_command",
        "language_command",
        "vision_language_config",
    },
    "cli": BASE | {"run_command", "commands", "data", "train"},
    "webui.worker": BASE
    | {"adapter", "families", "denoiser_hooks", "sampling", "sheets", "data", "webui.protocol"},
    "webui": BASE | {"families", "data.images", "data.survey", "data.buckets", "webui"},
}
"""Module or package (the longest name that fits) to the modules and packages it may import."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    module_name(path): path.read_text(encoding="utf-8")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
IS_PACKAGE = {name for name in SOURCES if (ROOT / name.replace(".", "/")).is_dir()}


def imports(name: str, source: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a module imports, anywhere in it."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            stem = [*stem, node.module] if node.module else stem
            for alias in node.names:
                yield node.lineno, ".".join([*stem, alias.name])


def short(name: str) -> str:
    return name.removeprefix("nora_diffusion.")


def best(name: str, names) -> str | None:
    """The longest of ``names`` that is the dotted name or holds it."""
    fits = [given for given in names if name == given or name.startswith(f"{given}.")]
    return max(fits, key=len, default=None)


def violations(name: str, source: str, is_package: bool, modules: set[str]) -> list[str]:
    """Every import of one of our ``modules`` that the table does not allow."""
    layer = best(short(name), MAY_IMPORT)
    if layer is None:
        return [f"{name}: has no place in MAY_IMPORT"]
    allowed = MAY_IMPORT[layer]
    found = []
    for line, imported in imports(name, source, is_package):
        target = best(imported, modules)
        if target is not None and target != name and best(short(target), allowed) is None:
            found.append(f"{name}:{line} imports {target}; {layer} may import {sorted(allowed)}")
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_imports_follow_the_architecture(name):
    assert violations(name, SOURCES[name], name in IS_PACKAGE, set(SOURCES)) == []


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("nora_diffusion.adapter.layer", "import nora_diffusion.families.sd", "families.sd"),
        ("nora_diffusion.adapter.layer", "from ..families import sd", "families.sd"),
        ("nora_diffusion.adapter.factors", "from .layer import NoraLayer", "adapter.layer"),
        ("nora_diffusion.families.sd", "def f():\n from nora_diffusion import train", "train"),
        ("nora_diffusion.data.images", "from .dataset import Dataset", "data.dataset"),
        ("nora_diffusion.data.cache", "from nora_diffusion.adapter import files", "adapter.files"),
        ("nora_diffusion.sampling", "from nora_diffusion.train.common import x", "train.common"),
        ("nora_diffusion.config", "import nora_diffusion.events", "events"),
        ("webui.app", "from nora_diffusion.sampling import sample_to_folder", "sampling"),
        ("nora_diffusion.train.dreambooth", "import webui.app", "webui.app"),
    ],
)
def test_forbidden_imports_are_found(name, source, target):
    (found,) = violations(name, source, False, {*SOURCES, "webui.app"})
    assert f"imports {target}" in found.replace("nora_diffusion.", "")


def test_new_modules_need_a_place():
    (found,) = violations("nora_diffusion.extras", "", False, set(SOURCES))
    assert "has no place" in found


def third_party(name: str) -> set[str]:
    """Imports of a module from outside this project and the standard library."""
    roots = {imported.split(".")[0] for _, imported in imports(name, SOURCES[name], False)}
    return {r for r in roots if r and r not in sys.stdlib_module_names} - {"nora_diffusion"}


def test_factors_need_torch_and_numpy_only():
    # An empty root is a relative import.
    assert third_party("nora_diffusion.adapter.factors") - {"adapter"} <= {"torch", "numpy"}


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith("nora_diffusion.adapter")])
def test_the_adapter_module_knows_nothing_of_diffusion(name):
    assert not third_party(name) & {"diffusers", "PIL", "pydantic"}


def test_only_one_file_touches_the_peft_enum():
    touching = [name for name, source in SOURCES.items() if "_value2member_map_" in source]
    assert touching == ["nora_diffusion.adapter.peft_type"]


HEAVY = ("torch", "numpy", "PIL", "peft", "diffusers", "transformers", "accelerate")
LIGHT = [
    "",
    ".schema",
    ".settings",
    ".presets",
    ".config",
    ".events",
    ".families",
    ".cli",
    ".commands",
    ".campaign.worker",
]
LIGHT_MODULES = [f"nora_diffusion{name}" for name in LIGHT]
if "webui.app" in SOURCES:
    LIGHT_MODULES.append("webui.app")


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in ``sys.modules`` of a fresh interpreter after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


@pytest.mark.parametrize("name", LIGHT_MODULES)
def test_importing_the_light_modules_leaves_torch_out(name):
    heavy = [] if name != "webui.app" else ["numpy", "PIL"]  # Gradio brings these itself
    assert not loaded_by(f"import {name}") & (set(HEAVY) - set(heavy))


def test_importing_the_package_loads_nothing_but_the_standard_library():
    extra = loaded_by("import nora_diffusion") - loaded_by("pass")
    assert extra - set(sys.stdlib_module_names) == {"nora_diffusion"}


def test_what_is_loaded_is_seen():
    assert {"numpy", "PIL"} <= loaded_by("import nora_diffusion.data.images")


def calls(source: str) -> Iterator[tuple[int, str, set[str]]]:
    """Line, dotted name and true keyword arguments of every call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            true = {
                k.arg
                for k in node.keywords
                if k.arg and not (isinstance(k.value, ast.Constant) and k.value.value is False)
            }
            yield node.lineno, ast.unparse(node.func), true


def unsafe(name: str, source: str) -> list[str]:
    """Loading that can run code from a file."""
    found = [
        f"{name}:{line} imports {imported}"
        for line, imported in imports(name, source, False)
        if imported.split(".")[0] in {"pickle", "dill", "joblib", "marshal", "shelve"}
    ]
    for line, function, true in calls(source):
        if function == "torch.load" and "weights_only" not in true:
            found.append(f"{name}:{line} calls torch.load without weights_only")
        if "trust_remote_code" in true or (function.endswith("np.load") and "allow_pickle" in true):
            found.append(f"{name}:{line} lets a file run code")
        if function in {"eval", "exec"} or "shell" in true:
            found.append(f"{name}:{line} runs text as a program")
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_no_file_can_run_code(name):
    assert unsafe(name, SOURCES[name]) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "eval(text)",
    ],
)
def test_unsafe_loading_is_found(source):
    assert len(unsafe("m", source)) == 1


def test_every_folder_with_code_is_a_package():
    """Or ``find_packages`` leaves it out of the wheel."""
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
