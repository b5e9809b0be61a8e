"""Instruction files as token sequences in which the answers alone are trained.

A file is a JSON array, or has one JSON object a line. An example is ``instruction``, ``input`` (may
be empty) and ``output``, as in LLM-Adapters (arXiv 2304.01933), or ``messages``: a chat of ``role``
and ``content``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nora_diffusion.settings import UserError, quote

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
UNTRAINED = -100
"""Label of a token that is context only, as torch's and transformers' losses know it."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)
"""Layout of a prompt for a model that has no chat template: that of Alpaca and LLM-Adapters."""


@dataclass(frozen=True)
class Example:
    """One tokenised example.

    Attributes:
        ids: the tokens.
        labels: the same where a token is trained, else ``UNTRAINED``.
    """

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoded:
    """The examples of some files, and what was left out.

    Attributes:
        examples: those of at most ``max_tokens``.
        total: examples in the files.
        longest: tokens of the longest example in the files.
        max_tokens: the limit.
    """

    examples: list[Example]
    total: int
    longest: int
    max_tokens: int

    def __str__(self) -> str:
        """What a user needs to know of the lengths."""
        lengths = sorted(len(example.ids) for example in self.examples)
        trained = sum(label != UNTRAINED for e in self.examples for label in e.labels)
        told = (
            f"{len(self.examples)} examples of {lengths[0]} to {lengths[-1]} tokens (median "
            f"{lengths[len(lengths) // 2]}), {trained / sum(lengths):.0%} of them trained"
        )
        left_out = self.total - len(self.examples)
        if left_out:
            told += (
                f"; {left_out} of {self.total} left out as longer than data.max_tokens = "
                f"{self.max_tokens} (the longest has {self.longest})"
            )
        return told


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON array, or of a file with one JSON object a line.

    Raises:
        UserError: when the file cannot be read or is neither.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    rows = _parse(path, text)
    if not rows:
        raise UserError(f"{path}: holds no examples")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, example {number}: is {quote(row)}, not an object of keys")
    return rows


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """One example as a chat.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            roles = ", ".join(ROLES)
            raise ValueError(f'messages: must be a list of {{"role": {roles}; "content": text}}')
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError("messages: none has the role assistant, so there is nothing to learn")
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            given = ", ".join(row) or "nothing"
            raise ValueError(f'{key}: missing or empty (it has {given}); or give "messages"')
    return [
        {"role": "user", "content": prompt_of(row)},
        {"role": "assistant", "content": row["output"].strip()},
    ]


def prompt_of(row: Mapping[str, Any]) -> str:
    """Instruction and input of an example as one text."""
    parts = (str(row["instruction"]).strip(), str(row.get("input") or "").strip())
    return "\n\n".join(part for part in parts if part)


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """A chat as the model reads it before it answers."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    return _begin(tokenizer) + ALPACA.format(prompt="\n\n".join(m["content"] for m in messages))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a rendered text, whose special tokens are in it already."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_messages(tokenizer: Any, messages: Sequence[Message]) -> Example:
    """Tokenise a chat; the assistant's answers, each with its end token, are trained.

    Prompt and answer are tokenised apart, so that training sees the very tokens that a prompt ends
    with at use.

    Raises:
        ValueError: when the chat template does not write a chat from front to back.
    """
    ids: list[int] = []
    labels: list[int] = []
    written = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:index])
        whole = _render(tokenizer, messages[: index + 1], prompt)
        if not prompt.startswith(written) or not whole.startswith(prompt):
            raise ValueError(
                "the model's chat template rewrites what it wrote of earlier messages; give chats "
                "of one question and one answer"
            )
        context = encode_text(tokenizer, prompt[len(written) :])
        answer = encode_text(tokenizer, whole[len(prompt) :])
        end = _last(answer, tokenizer.eos_token_id) + 1 or len(answer)
        ids += context + answer
        labels += [UNTRAINED] * len(context) + answer[:end] + [UNTRAINED] * (len(answer) - end)
        written = whole
    return Example(ids, labels)


def encode_files(tokenizer: Any, files: Sequence[str | Path], max_tokens: int) -> Encoded:
    """Tokenise all examples of some files; those longer than the limit are left out.

    An answer cut off in its middle would teach just that, so nothing is truncated.

    Raises:
        UserError: naming file and example, or when nothing is left.
    """
    examples: list[Example] = []
    longest = total = 0
    for file in files:
        try:
            rows = read_rows(file)
        except UserError as error:
            raise UserError(f"data.files: {error}") from None
        for number, row in enumerate(rows, start=1):
            try:
                example = encode_messages(tokenizer, messages_of(row))
            except ValueError as error:
                raise UserError(f"data.files: {file}, example {number}: {error}") from None
            total += 1
            longest = max(longest, len(example.ids))
            if len(example.ids) <= max_tokens:
                examples.append(example)
    if not examples:
        raise UserError(
            f"data.max_tokens = {max_tokens}: all {total} examples are longer (the longest has "
            f"{longest} tokens); raise it"
        )
    return Encoded(examples, total, longest, max_tokens)


def _render(tokenizer: Any, messages: Sequence[Message], prompt: str) -> str:
    """A chat that ends with an answer; ``prompt`` is what comes before that answer."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(list(messages), tokenize=False)
    return prompt + messages[-1]["content"] + tokenizer.eos_token


def _begin(tokenizer: Any) -> str:
    """The token that a model without chat template expects first, if it does."""
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token if first == [tokenizer.bos_token_id] else ""


def _last(ids: Sequence[int], token: int | None) -> int:
    """Index of the last occurrence of a token, or -1."""
    return max((index for index, found in enumerate(ids) if found == token), default=-1)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ROLES
        and isinstance(message.get("content"), str)
    )


def _parse(path: Path, text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}: is not valid JSON: {error}") from None
    rows: list[Any] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: is not valid JSON ({error}); give a JSON array, or one "
                "object a line"
            ) from None
    return rows
