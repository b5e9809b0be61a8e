"""Files of questions with options.

They are instruction files as in LLM-Adapters: ``instruction input output answer``, where the
instruction ends with ``Answer format: answer1/answer2/...`` or a key ``options`` lists them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nora_diffusion.data.instructions import prompt_of, read_rows
from nora_diffusion.settings import UserError

_FORMAT = re.compile(r"answer format:\s*(.+?)\s*$", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: the user's message.
        options: the possible answers.
        correct: index of the right one.
        answers: the whole answer text for each option.
    """

    prompt: str
    options: tuple[str, ...]
    correct: int
    answers: tuple[str, ...]


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The first ``limit`` questions of a file.

    Raises:
        UserError: naming file and question.
    """
    questions: list[Question] = []
    for number, row in enumerate(read_rows(path)[:limit], start=1):
        try:
            questions.append(_question(row))
        except ValueError as error:
            raise UserError(f"{path}, question {number}: {error}") from None
    return questions


def _question(row: dict[str, Any]) -> Question:
    for key in ("instruction", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{key}: missing or empty")
    options = row.get("options")
    if options is None:
        told = _FORMAT.search(row["instruction"])
        options = [part.strip() for part in told[1].split("/")] if told else []
    if not isinstance(options, list) or len(options) < 2 or not all(map(_is_text, options)):
        raise ValueError(
            'it names no options: end the instruction with "Answer format: a/b/c", or add the key '
            '"options", a list of two or more texts'
        )
    answer = row["answer"].strip()
    if answer not in options:
        raise ValueError(f'answer "{answer}": is none of the options {", ".join(options)}')
    output = str(row.get("output") or answer).strip()
    before, found, after = output.rpartition(answer)
    answers = tuple(before + option + after if found else option for option in options)
    return Question(prompt_of(row), tuple(options), options.index(answer), answers)


def _is_text(option: Any) -> bool:
    return isinstance(option, str) and bool(option.strip())
