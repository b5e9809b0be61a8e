"""What ``language.py`` trains on and asks: LLM-Adapters' questions, as they are or as text."""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nora_diffusion.data.instructions import Example, encode_messages, messages_of, read_rows
from nora_diffusion.disk import write_atomically

SETS = ("ARC-Easy", "ARC-Challenge", "openbookqa", "boolq")


@dataclass(frozen=True)
class Size:
    """What a run of the benchmark costs."""

    max_tokens: int
    steps: int
    batch_size: int
    train_examples: int  # a set, at most
    validation_questions: int  # a set, from the end of the training file
    test_questions: int | None  # a set; None: all
    fit_batches: int  # for the bases that are fitted to data
    system_turn: bool  # of SmolLM2's chat template: 23 more tokens an example


def read_questions(
    data: Path, folder: Path, tokenizer: Any, size: Size, text: bool
) -> tuple[list[list[Example]], list[Path], list[Path]]:
    """Training rows, and files of the validation and test questions that are short enough.

    Args:
        data: folder of the sets.
        folder: where the files of questions are written.
        tokenizer: of the base.
        size: how many, and how long.
        text: whether answers are the options themselves.
    """

    def short(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
        lengths = ((row, len(encode_messages(tokenizer, messages_of(row)).ids)) for row in rows)
        return list(itertools.islice((r for r, n in lengths if n <= size.max_tokens), limit))

    train: list[list[Example]] = []
    validation: list[Path] = []
    test: list[Path] = []
    for name in SETS:
        rows, of_test = (read_rows(data / name / f"{part}.json") for part in ("train", "test"))
        if text:
            rows, of_test = ([*map(with_text_answers, part)] for part in (rows, of_test))
        held = short(rows[::-1], size.validation_questions)
        kept = short(rows, size.train_examples + len(held))
        kept = [row for row in kept if row not in held][: size.train_examples]
        train += [[encode_messages(tokenizer, messages_of(row))] for row in kept]
        asked = short(of_test, size.test_questions)
        for part, questions, files in (("validation", held, validation), ("test", asked, test)):
            files.append(folder / f"{name}-{part}.json")
            write_atomically(files[-1], json.dumps(questions).encode())
    return train, validation, test


def with_text_answers(row: dict[str, Any]) -> dict[str, Any]:
    """A question of numbered options without them, whose answer is an option's own text.

    One of true or false stays as it is.
    """
    question, *rest = row["instruction"].split("\n\n")
    options = [text.strip() for text in re.split(r"\bAnswer\d+: ", rest[0])[1:]]
    if not options:
        return row
    right = options[int(row["answer"].removeprefix("answer")) - 1]
    question = question.removeprefix("Please choose the correct answer to the question: ")
    return {
        "instruction": question, "input": "", "options": options, "answer": right, "output": right,
    }  # fmt: skip
