"""What is read of instruction files, and which tokens of it are trained."""

import json

import pytest

from nora_diffusion.data.instructions import (
    UNTRAINED,
    encode_files,
    encode_messages,
    encode_text,
    messages_of,
    read_rows,
    render_prompt,
)
from nora_diffusion.settings import UserError
from tests.tiny_language import tiny_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Eins"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Zwei"},
]
ROW = {"instruction": "Say it in German", "input": "one", "output": "eins", "answer": "eins"}


def trained(tokenizer, example) -> str:
    return tokenizer.decode([label for label in example.labels if label != UNTRAINED])


def test_the_answers_and_their_ends_are_trained_and_nothing_else():
    tokenizer = tiny_tokenizer()
    assert trained(tokenizer, encode_messages(tokenizer, CHAT)) == "Eins<|end|>Zwei<|end|>"
    assert trained(tokenizer, encode_messages(tokenizer, messages_of(ROW))) == "eins<|end|>"


def test_a_trained_token_is_the_token_that_stands_there():
    example = encode_messages(tiny_tokenizer(), CHAT)
    assert all(b in (UNTRAINED, a) for a, b in zip(example.ids, example.labels, strict=True))


def test_training_sees_the_whole_chat_as_the_template_writes_it():
    tokenizer = tiny_tokenizer()
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(encode_messages(tokenizer, CHAT).ids) == whole


def test_training_sees_the_very_prompt_of_later_use():
    tokenizer = tiny_tokenizer()
    prompt = encode_text(tokenizer, render_prompt(tokenizer, messages_of(ROW)[:1]))
    example = encode_messages(tokenizer, messages_of(ROW))
    assert example.ids[: len(prompt)] == prompt
    assert example.labels[len(prompt)] != UNTRAINED
    assert set(example.labels[: len(prompt)]) == {UNTRAINED}


def test_the_input_follows_the_instruction():
    assert messages_of(ROW)[0]["content"] == "Say it in German\n\none"


def test_a_model_without_chat_template_gets_the_alpaca_layout():
    tokenizer = tiny_tokenizer(template=None)
    example = encode_messages(tokenizer, messages_of(ROW))
    text = tokenizer.decode(example.ids)
    assert "### Instruction:\nSay it in German\n\none\n\n### Response:\neins<|end|>" in text
    assert trained(tokenizer, example) == "eins<|end|>"


def test_json_and_json_lines_are_read_alike(tmp_path):
    rows = [ROW, {"messages": CHAT}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    assert read_rows(tmp_path / "a.json") == read_rows(tmp_path / "a.jsonl") == rows


def test_examples_above_the_limit_are_left_out_and_reported(tmp_path):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([ROW, {**ROW, "input": "x" * 100}, ROW]))
    encoded = encode_files(tiny_tokenizer(), [file], 64)
    assert len(encoded.examples) == 2
    assert "1 of 3 left out" in str(encoded)
    assert f"the longest has {encoded.longest}" in str(encoded)
    assert encoded.longest > 100
    with pytest.raises(UserError, match=r"data.max_tokens = 9: all 3 .* raise it"):
        encode_files(tiny_tokenizer(), [file], 9)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[{"instruction": "a"}]', "example 1: output: missing or empty"),
        ('{"instruction": "a", "output": "b"}\n{oops}', "line 2: is not valid JSON"),
        ("[1]", "example 1: is 1, not an object"),
        ("[", "is not valid JSON"),
        ("", "holds no examples"),
        ('[{"messages": [{"role": "bot", "content": "a"}]}]', "messages: must be a list"),
        ('[{"messages": [{"role": "user", "content": "a"}]}]', "nothing to learn"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, text, told):
    file = tmp_path / "data.json"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        encode_files(tiny_tokenizer(), [file], 64)
    assert str(file) in str(caught.value)
    assert told in str(caught.value)


def test_a_template_that_rewrites_earlier_messages_is_refused():
    # As those do that drop the thoughts of all answers but the last.
    template = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites"):
        encode_messages(tiny_tokenizer(template), CHAT)
