"""What pages say is tested has a test of that name; commands that they show can be typed."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from nora_diffusion.command_line import make_parser
from nora_diffusion.config import DreamboothConfig
from nora_diffusion.language_config import LanguageConfig
from nora_diffusion.run_config import load_config
from nora_diffusion.settings import part_overrides
from nora_diffusion.vision_language_config import VisionLanguageConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEST_ID = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
SCHEMAS = {
    schema.command: schema for schema in (DreamboothConfig, LanguageConfig, VisionLanguageConfig)
}
SHELL = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
OURS = re.compile(r"(?:^|--no_python )(nora(?:-dreambooth)? .+)")
COMMANDS = [
    (page.name, match[1])
    for page in PAGES
    for block in SHELL.findall(page.read_text("utf-8"))
    for line in block.replace("\\\n", " ").splitlines()
    if (match := OURS.search(line))
]
IDS = sorted({match for page in PAGES for match in TEST_ID.findall(page.read_text("utf-8"))})


@cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("path", "test"), IDS)
def test_a_test_that_a_page_names_is_there(path, test):
    assert test.startswith("test_") and test in functions_of(path)


def test_every_cell_of_the_load_matrix_has_its_proof_or_says_that_it_has_none():
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    after = page.partition("<!-- load matrix")[2]
    lines = [line for line in after.splitlines() if line.startswith("|")]
    table = lines[: next(i for i, line in enumerate(lines) if "| holds |" in line)]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    proofs = dict(re.findall(r"^- (\w): `(tests/.+)`$", after, re.MULTILINE))
    assert len(header) == 11 and len(rows) == 10 and len(proofs) == 13
    used: set[str] = {"i"}  # of the cells without a file
    for row in rows:
        assert len(row) == len(header), row
        for cell in row[2:]:
            if cell in ("not verified", "no loader", "–"):
                continue
            letters = set(re.sub(r"^names|^no|[()]", "", cell).split())
            assert letters and letters <= proofs.keys(), (row, cell)
            used |= letters
    assert used == proofs.keys()


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_that_a_page_shows_can_be_typed(page, line):
    """Its options are there, and the settings it gives are allowed; files are not looked for."""
    words = shlex.split(line, comments=True)
    command = next((name for name in SCHEMAS if line.startswith(f"{name} ")), None)
    if command is None:
        make_parser({}).parse_args(words[1:])
        return
    rest, overrides = part_overrides(words[len(command.split()) :])
    if "--resume" in rest:
        assert len(rest) == 2  # the run's own config is in its folder
        return
    load_config(SCHEMAS[command], rest[0], overrides)


def test_pages_show_commands_of_every_kind():
    assert len(COMMANDS) > 25
    assert {"nora llm", "nora vlm", "nora-dreambooth", "nora sample", "nora inspect"} <= {
        " ".join(line.split()[: 1 if line.startswith("nora-") else 2]) for _, line in COMMANDS
    }
