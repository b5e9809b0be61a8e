"""``nora bench report``: pages say what the recorded results say."""

import json
from pathlib import Path

import pytest

from nora_diffusion.bench.report import aim, beaten_by, check_report, share, write_report
from nora_diffusion.cli import main
from nora_diffusion.config import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    for folder in ("docs", "benchmarks/report", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    page = "before\n<!-- report: gap -->\nold\n<!-- end of report -->\nafter\n"
    (tmp_path / "README.md").write_text(page)
    (tmp_path / "docs" / "plain.md").write_text("no numbers\n")
    template = 'The gap is {{ results("subject").gap | share | aim(False) }}.\n'
    (tmp_path / "benchmarks" / "report" / "gap.md").write_text(template)
    record(tmp_path, 0.19)
    return tmp_path


def record(checkout, gap):
    path = checkout / "benchmarks" / "results" / "subject.json"
    path.write_text(json.dumps({"results": {"gap": gap}}))


def test_the_pages_of_this_project_say_what_was_measured():
    assert check_report(ROOT) == []


def test_a_part_is_rendered_and_the_rest_is_left_alone(checkout):
    assert check_report(checkout) == ["README.md: gap"]
    assert write_report(checkout) == [checkout / "README.md"]
    assert (checkout / "README.md").read_text() == (
        "before\n<!-- report: gap -->\nThe gap is **19 %** (missed).\n"
        "<!-- end of report -->\nafter\n"
    )
    assert check_report(checkout) == [] and write_report(checkout) == []


def test_a_new_result_and_a_number_changed_by_hand_are_found(checkout, monkeypatch, capsys):
    write_report(checkout)
    monkeypatch.chdir(checkout)
    assert main(["bench", "report", "--check"]) == 0
    record(checkout, 0.25)
    assert main(["bench", "report", "--check"]) == 1
    assert "README.md: gap" in capsys.readouterr().out
    assert main(["bench", "report"]) == 0
    page = checkout / "README.md"
    page.write_text(page.read_text().replace("25 %", "35 %"))
    assert main(["bench", "report", "--check"]) == 1


def test_a_template_is_told_the_word_after_its_name(checkout):
    page = "<!-- report: gap one -->\n<!-- end of report -->\n"
    (checkout / "README.md").write_text(page + page.replace("one", "two"))
    (checkout / "benchmarks" / "report" / "gap.md").write_text("of {{ which }}\n")
    assert check_report(checkout) == ["README.md: gap", "README.md: gap"]
    write_report(checkout)
    assert (checkout / "README.md").read_text().splitlines()[1::3] == ["of one", "of two"]


def test_what_stands_before_a_method_is_at_least_as_good_in_both():
    lines = [
        {"method": name, "gap_closed": gap, "text_adapted": text, "file_bytes": size}
        for name, gap, text, size in (
            ("a", 0.05, 0.5, 100), ("b", 0.05, 0.6, 900), ("c", 0.04, 0.9, 1), ("d", 0.9, 0.4, 200),
        )
    ]  # fmt: skip
    lines += [{"method": "diverged"}, {"method": "not timed", "gap_closed": 1.0}]
    assert beaten_by(lines, "a", "text_adapted") == ["b"]
    assert beaten_by(lines, "a", "file_bytes") == []
    assert beaten_by(lines, "b", "file_bytes") == ["a", "d"]


def test_what_is_missing_is_named(checkout, tmp_path):
    (checkout / "benchmarks" / "report" / "gap.md").write_text('{{ results("gone").gap }}')
    with pytest.raises(UserError, match="gone.json: no such result"):
        check_report(checkout)
    (checkout / "benchmarks" / "report" / "gap.md").write_text('{{ results("subject").gpa }}')
    with pytest.raises(UserError, match="part gap: UndefinedError.*gpa"):
        check_report(checkout)
    with pytest.raises(UserError, match="run this in a checkout"):
        check_report(tmp_path / "docs")


def test_nothing_is_written_when_a_later_page_lacks_its_result(checkout):
    (checkout / "docs" / "later.md").write_text("<!-- report: gone -->\n<!-- end of report -->\n")
    (checkout / "benchmarks" / "report" / "gone.md").write_text('{{ results("gone").gap }}')
    before = (checkout / "README.md").read_text()
    assert "\nold\n" in before  # what would have been rendered anew
    with pytest.raises(UserError, match="gone.json: no such result"):
        write_report(checkout)
    assert (checkout / "README.md").read_text() == before


def test_plots_are_drawn_again_when_their_numbers_change(checkout):
    write_report(checkout)
    results, plot = (
        checkout / "benchmarks/results/ranks.json",
        checkout / "docs/images/bench-ranks.png",
    )
    cells = [
        {"subject": "poodle", "r": r, "inner_r": k, "score": 0.1 * k}
        for r, k in ((4, 1), (8, 1), (8, 2))
    ]
    results.write_text(json.dumps({"results": {"cells": cells}}))
    assert check_report(checkout) == ["docs/images/bench-ranks.png"]
    assert write_report(checkout) == [plot]
    assert check_report(checkout) == [] and write_report(checkout) == []
    cells[0]["score"] = 0.3
    results.write_text(json.dumps({"results": {"cells": cells}}))
    assert check_report(checkout) == ["docs/images/bench-ranks.png"]
    results.write_text(json.dumps({"results": {"cells": []}}))  # nothing measured yet
    assert check_report(checkout) == []


def test_filters():
    assert share(-0.004) == "0 %" and share(0.194) == "19 %" and share(-0.0051, 1) == "-0.5 %"
    assert aim("3 s", True) == "3 s" and aim("3 s", False) == "**3 s** (missed)"
