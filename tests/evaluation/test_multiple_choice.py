"""Options scored from a shared prefix are those scored one by one; answers are read as written."""

import json

import pytest
import torch

from nora_diffusion.data.instructions import encode_text, render_prompt
from nora_diffusion.evaluation.multiple_choice import (
    evaluate,
    first_option,
    table,
)
from nora_diffusion.evaluation.questions import read_questions
from nora_diffusion.settings import UserError
from tests.tiny_language import KINDS, tiny_model, tiny_tokenizer, write_questions

TOKENIZER = tiny_tokenizer()
ONE_TOKEN = ["a", "b", "c"]
SEVERAL_TOKENS = ["left", "right", "up"]
ONE_BEGINS_ANOTHER = ["answer1", "answer10", "answer2"]


def write(tmp_path, *options: list[str]) -> str:
    file = tmp_path / "questions.json"
    rows = [
        {
            "instruction": f"Which, {'please ' * (i % 3)}number {i}?",
            "input": "",
            "output": f"it is {of_this[i % len(of_this)]}",
            "answer": of_this[i % len(of_this)],
            "options": of_this,
        }
        for of_this in options
        for i in range(5)
    ]
    file.write_text(json.dumps(rows))
    return str(file)


def log_likelihood(model, prompt: str, answer: str) -> float:
    """Of an answer after a prompt, in one pass of its own."""
    before, after = encode_text(TOKENIZER, prompt), encode_text(TOKENIZER, answer)
    log_p = model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(float(log_p[len(before) + i - 1, token]) for i, token in enumerate(after))


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_reads_no_slice_of_the_hidden_states(tmp_path, kind):
    """Its product would copy the head's weight for each row, five times the rest's time."""
    model, seen = tiny_model(kind), []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    evaluate(model, TOKENIZER, write(tmp_path, SEVERAL_TOKENS), cache=False)
    assert seen
    assert all(hidden.is_contiguous() for hidden in seen)
    assert seen[0].shape[1] == 1  # of the prompts, the last position alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        (ONE_TOKEN,),
        (SEVERAL_TOKENS,),
        (ONE_BEGINS_ANOTHER,),
        (ONE_TOKEN, SEVERAL_TOKENS, ["yes", "no"]),
    ],
    ids=["one token", "several", "prefix", "mixed"],
)
def test_the_most_likely_option_is_that_of_single_passes(tmp_path, kind, options):
    model, file = tiny_model(kind), write(tmp_path, *options)
    scores = evaluate(model, TOKENIZER, file, batch_size=4, cache=False)
    for index, question in enumerate(read_questions(file)):
        prompt = render_prompt(TOKENIZER, [{"role": "user", "content": question.prompt}])
        end = "<|end|>" if ONE_BEGINS_ANOTHER[0] in question.options else ""
        wanted = torch.tensor(
            [log_likelihood(model, prompt, answer + end) for answer in question.answers]
        )
        assert scores.likelihood[index] == int(wanted.argmax())
        right = float(wanted.softmax(0)[question.correct])
        assert scores.probability[index] == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_the_scores_do_not_depend_on_the_batch(tmp_path, batch_size):
    file = write(tmp_path, ONE_TOKEN, SEVERAL_TOKENS)
    whole = evaluate(tiny_model(), TOKENIZER, file, batch_size=10, cache=False)
    other = evaluate(tiny_model(), TOKENIZER, file, batch_size=batch_size, cache=False)
    assert (whole.likelihood, whole.generated) == (other.likelihood, other.generated)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_generated_is_what_transformers_generates(tmp_path, kind):
    model = tiny_model(kind)
    options = list("etaoinshrdlu")  # single letters, so that a random model writes some
    file = write(tmp_path, options)
    scores = evaluate(model, TOKENIZER, file, batch_size=4, max_new_tokens=8, cache=False)
    for index, question in enumerate(read_questions(file)):
        text = render_prompt(TOKENIZER, [{"role": "user", "content": question.prompt}])
        ids = torch.tensor([encode_text(TOKENIZER, text)])
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=256)
        written = TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert scores.generated[index] == first_option(written, options)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("the correct answer is answer2", 1),
        ("Answer10, not answer1", 2),
        ("ANSWER1.", 0),
        ("answer3", -1),
        ("answers", -1),
        ("", -1),
    ],
)
def test_the_first_option_that_is_written_counts(text, index):
    assert first_option(text, ["answer1", "answer2", "answer10"]) == index


def test_options_and_whole_answers_are_read_of_the_form_of_llm_adapters(tmp_path):
    (question, *_) = read_questions(write_questions(tmp_path / "q.json", 3))
    assert question.options == ("a", "b", "c")
    assert question.answers == ("it is a", "it is b", "it is c")
    assert question.correct == 0


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"instruction": "Which?", "answer": "a"}, "names no options"),
        ({"instruction": "Answer format: a/b", "answer": "c"}, 'answer "c": is none'),
        ({"instruction": "Answer format: a/b"}, "answer: missing"),
        ({"instruction": "Which?", "answer": "a", "options": ["a"]}, "names no options"),
    ],
)
def test_what_is_no_question_is_named(tmp_path, row, told):
    file = tmp_path / "q.json"
    file.write_text(json.dumps([row]))
    with pytest.raises(UserError) as caught:
        read_questions(file)
    assert f"{file}, question 1: " in str(caught.value)
    assert told in str(caught.value)


def test_a_result_is_kept_until_model_or_questions_change(tmp_path):
    model, file = tiny_model(), write_questions(tmp_path / "q.json", 6)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    first = evaluate(model, TOKENIZER, file)
    assert calls
    calls.clear()
    assert evaluate(model, TOKENIZER, file) == first
    assert not calls
    evaluate(model, TOKENIZER, file, limit=3)
    assert calls
    calls.clear()
    with torch.no_grad():
        next(model.parameters())[0] += 1
    evaluate(model, TOKENIZER, file)
    assert calls


def test_progress_is_told(tmp_path):
    told = []
    file = write_questions(tmp_path / "q.json", 7)
    evaluate(
        tiny_model(), TOKENIZER, file, batch_size=3, cache=False,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(3, 7), (6, 7), (7, 7)]


def test_the_table_shows_both_accuracies(tmp_path):
    scores = evaluate(tiny_model(), TOKENIZER, write_questions(tmp_path / "q.json", 6))
    line = table([("base", [scores])]).splitlines()[1]
    for shown in (scores.likelihood_accuracy, scores.generated_accuracy, 1 / 3):
        assert f"{shown:.1%}" in line
