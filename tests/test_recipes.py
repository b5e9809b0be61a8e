"""Recipes: valid, found by name, no shipped configs; what their page says can be typed."""

import argparse
import csv
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nora_diffusion import commands
from nora_diffusion.cli import main, main_dreambooth
from nora_diffusion.command_line import make_parser
from nora_diffusion.config import DreamboothConfig
from nora_diffusion.language_config import LanguageConfig
from nora_diffusion.run_config import load_config, shipped_configs, shipped_recipes
from nora_diffusion.settings import ConfigError, part_overrides
from nora_diffusion.vision_language_config import VisionLanguageConfig
from tests.tiny_language import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs" / "recipes").glob("*.toml"))
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
SCHEMAS = {
    schema.command: schema for schema in (DreamboothConfig, LanguageConfig, VisionLanguageConfig)
}
QUICK = "recipes/dreambench_sd15"  # the others have some thousand layers to be laid out
DREAMBOOTH = [
    name if name == QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in shipped_recipes(DreamboothConfig.command)
]


def commands_of_page() -> list[list[str]]:
    """The words of each line of the page's shell blocks; a line ending in a backslash goes on."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def ours() -> list[list[str]]:
    """Those that are commands of this package, without the shell's loop around them."""
    found: list[list[str]] = []
    for words in commands_of_page():
        words = words[words.index("do") + 1 :] if "do" in words else words
        words = words[: words.index("done")] if "done" in words else words
        words = [word.removesuffix(";").replace("$run", "runs/dog") for word in words]
        if words and words[0] in ("nora", "nora-dreambooth"):
            found.append(words)
    return found


def schema_of(path: Path) -> tuple[type, list[str]]:
    """The schema of a recipe, and what stands after the command in its first line."""
    first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    (command,) = [name for name in SCHEMAS if first.startswith(f"{name} ")]
    return SCHEMAS[command], shlex.split(first.removeprefix(command))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_short_valid_and_starts_with_its_command(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 30
    schema, (name, *overrides) = schema_of(path)
    assert name == f"recipes/{path.stem}"
    assert load_config(schema, name, overrides) == load_config(schema, path, overrides)


def test_recipes_are_no_shipped_configs_and_a_near_name_is_told():
    for command in SCHEMAS:
        assert not any("recipes" in name for name in shipped_configs(command))
        assert not {path.stem for path in FILES} & shipped_configs(command).keys()
    with pytest.raises(ConfigError, match="did you mean recipes/dreambench_sdxl"):
        load_config(DreamboothConfig, "recipes/dreambench_xl")


@pytest.mark.parametrize("name", DREAMBOOTH)
def test_a_picture_recipe_dry_runs_offline_and_the_page_quotes_its_memory(
    name, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    path = ROOT / "configs" / f"{name}.toml"
    words = schema_of(path)[1]
    words[words.index("--data.subject") + 1] = str(ROOT / "sample_data" / "subject")
    assert main_dreambooth([*words, "--model.device", "cpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out)["model"]["base"] in PAGE
    (told,) = re.findall(r"# (predicted memory: .* GB at the peak.*)", out)
    section = PAGE.partition(f"`{name}`\n")[2].partition("\n## ")[0]
    assert told in section
    for part in re.findall(r"#   (weights|activations|while encoding) +(\S+ GB)", out):
        assert re.search(rf"^  {part[0]} +{re.escape(part[1])}$", section, re.MULTILINE), part


def test_the_language_recipe_dry_runs_on_a_small_base(tmp_path, capsys, monkeypatch):
    """Its own base cannot be had offline: a small Llama stands for it, a file for the data."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer(None).save_pretrained(tmp_path / "base")
    data = tmp_path / "commonsense_170k.json"
    row = {"instruction": "Yes or no?", "input": "", "output": "yes", "answer": "yes"}
    data.write_text(json.dumps([row] * 3))
    given = ["--model.base", str(tmp_path / "base"), "--data.files", str(data)]
    given += ["--data.max_tokens", "512", "--output.dir", str(tmp_path / "run")]
    words = schema_of(ROOT / "configs" / "recipes" / "commonsense_llama3.toml")[1]
    assert main(["llm", words[0], *given, "--model.device", "cpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    # Of two blocks q, up and down with r 32, k and v with r 16: 2 r k numbers a module.
    assert f"# 3 rows; {2 * (3 * 2 * 32 * 8 + 2 * 2 * 16 * 8):,} trained parameters" in out


def test_the_few_shot_recipe_dry_runs_offline(capsys, monkeypatch, tmp_path):
    """On two classes of as many pictures as it asks for, in place of its own data."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    words = schema_of(ROOT / "configs" / "recipes" / "clip_lora_few_shot.toml")[1]
    for key in ("--few_shot.images", "--few_shot.test"):
        for name in ("forest", "river"):
            folder = Path(words[words.index(key) + 1]) / name
            folder.mkdir(parents=True)
            for i in range(16):
                (folder / f"{i}.png").touch()
    assert main(["vlm", *words, "--dry-run"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["train"]["steps_per_shot"] == 500


def test_the_page_has_every_recipe_and_no_other():
    told = re.findall(r"^## .*: `(recipes/\w+)`$", PAGE, re.MULTILINE)
    assert sorted(told) == [f"recipes/{path.stem}" for path in FILES]
    assert set(re.findall(r"recipes/[a-z]\w+", PAGE)) == set(told)


@pytest.mark.parametrize("words", ours(), ids=" ".join)
def test_a_command_of_the_page_parses(words):
    if words[0] == "nora-dreambooth" or words[1] in ("llm", "vlm"):
        command = words[0] if words[0] == "nora-dreambooth" else " ".join(words[:2])
        source, *given = words[len(command.split()) :]
        load_config(SCHEMAS[command], source, [word for word in given if word != "--dry-run"])
        return
    argv, overrides = part_overrides(words[1:]) if words[1] == "campaign" else (words[1:], [])
    args = make_parser(commands.ACTIONS).parse_args(
        argv, argparse.Namespace(argv=argv, overrides=overrides)
    )
    if words[1] == "campaign":
        config = load_config(
            DreamboothConfig, args.config, [*overrides, "data.subject=x", "data.class_name=y"]
        )
        assert config.model.base in PAGE


def test_the_page_runs_commands_of_every_recipe_and_scripts_that_are_there():
    run = {word for words in ours() for word in words}
    assert {f"recipes/{path.stem}" for path in FILES} <= run
    scripts = [word for words in commands_of_page() for word in words if word.endswith(".py")]
    own = [name for name in scripts if name.startswith("scripts/")]
    assert own and all((ROOT / name).is_file() for name in own)


def run_block(first: str, folder: Path) -> str:
    """What the page's Python block with this text prints, run in a folder."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if first in block]
    return subprocess.run(
        [sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def test_the_pages_mean_over_subjects_reads_eval_json(tmp_path):
    for name, dino, text in (("a", 0.5, 0.2), ("b", 0.7, 0.4)):
        folder = tmp_path / "runs" / "dreambench_sd15" / name / "eval"
        folder.mkdir(parents=True)
        backends = [
            {"backend": "DINO", "training": {"adapted": dino}},
            {"backend": "CLIP", "training": {"adapted": dino}, "text": {"adapted": text}},
        ]
        (folder / "eval.json").write_text(json.dumps({"backends": backends}))
    assert run_block("eval.json", tmp_path).splitlines() == [
        "DINO, training: 0.600 over 2 subjects",
        "CLIP, training: 0.600 over 2 subjects",
        "CLIP, text: 0.300 over 2 subjects",
    ]


def test_the_pages_split_of_eurosat_makes_a_folder_a_class(tmp_path):
    (tmp_path / "2750" / "River").mkdir(parents=True)
    (tmp_path / "2750" / "River" / "River_1.jpg").touch()
    split = {"train": [["River/River_1.jpg", 8, "River"]], "val": [], "test": []}
    (tmp_path / "split_zhou_EuroSAT.json").write_text(json.dumps(split))
    run_block("split_zhou", tmp_path)
    assert (tmp_path / "train" / "River" / "River_1.jpg").is_file()


def test_the_table_of_dreambench_names_every_subject_with_its_class(tmp_path):
    listing = (
        "Classes\n\nsubject_name,class\ncat2,cat\nbear_plushie,stuffed animal\n\nPrompts\n\na, b\n"
    )
    (tmp_path / "prompts_and_classes.txt").write_text(listing)
    script = [sys.executable, str(ROOT / "scripts" / "dreambench_table.py"), str(tmp_path)]
    failed = subprocess.run(script, capture_output=True, text=True)
    assert failed.returncode == 1 and "cat2: no such folder" in failed.stderr
    for name in ("cat2", "bear_plushie"):
        (tmp_path / "one" / name).mkdir(parents=True)
    done = subprocess.run(
        [*script, "--photos", str(tmp_path / "one")], capture_output=True, text=True, check=True
    )
    table = list(csv.DictReader(done.stdout.splitlines()))
    assert [(row["name"], row["class_name"]) for row in table] == [
        ("cat2", "cat"),
        ("bear_plushie", "stuffed animal"),
    ]
    assert table[0]["subject"] == str(tmp_path / "one" / "cat2")


def test_targets_of_a_recipe_are_those_of_its_base(capsys):
    assert main(["targets", "sd15", "--targets", "attention"]) == 0
    of_base = capsys.readouterr().out
    assert main(["targets", QUICK, "--targets", "attention"]) == 0
    assert capsys.readouterr().out == of_base


def test_the_recorded_memory_is_what_the_command_says_today(capsys, monkeypatch):
    """README's part and the recipes' are rendered from that record."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)
    record = json.loads((ROOT / "benchmarks" / "results" / "dry_runs.json").read_bytes())
    found = record["results"]["sd15"]
    assert main_dreambooth([*shlex.split(found["command"])[1:], "--model.device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "\n".join(f"# {line}" for line in found["memory"]) in out
