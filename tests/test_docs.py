"""What the pages say is tested has a test of that name."""

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEST_ID = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
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


def test_the_page_on_memory_shows_the_numbers_that_were_measured():
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    record = (ROOT / "benchmarks" / "results" / "families-cpu.json").read_text(encoding="utf-8")
    results = json.loads(record)["results"]
    shown = page.partition("<!-- families-cpu.json")[2]
    for case in results.keys() - {"aims"}:
        limit, lora, nora = results[case]["real_shapes"]["variants"].values()
        kept, operators = "saved_for_backward_over_limit_percent", "operators_per_step"
        cells = [
            case,
            f"{limit['saved_for_backward_bytes'] / 1e6:.0f} MB",
            *(f"{row[kept]:+.3f} %" for row in (lora, nora)),
            *(f"{row[operators]:,}" for row in (limit, lora, nora)),
        ]
        assert "| " + " | ".join(cells) + " |" in shown
        measured = results[case].get("measured", {"variants": {}})["variants"]
        for step in ("eager_batch_1", "compiled_batch_4") if measured else ():
            lora, nora = measured["lora_r16"][step], measured["nora_64_8"][step]
            ratios = [lora["ratio_to_limit"], nora["ratio_to_limit"], nora["ratio_to_lora"]]
            label = step.replace("_", ", ", 1).replace("_", " ")
            assert f"| {case} | {label} | {' | '.join(map(str, ratios))} |" in shown
