"""What the pages say is tested has a test of that name."""

import ast
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
