"""Accuracy of a language model on questions with options, by likelihood and by generation.

Questions are those of ``evaluation.questions``.

* likelihood: the option whose answer text the model finds most likely after the prompt;
* generated: the first option that occurs in what the model writes, greedily, as LLM-Adapters
  scores it; an answer that names none is wrong.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from nora_diffusion.adapter import kept_updates
from nora_diffusion.adapter.factor_cache import cache_dir
from nora_diffusion.data.instructions import encode_text, render_prompt
from nora_diffusion.disk import write_atomically
from nora_diffusion.evaluation.questions import Question, read_questions

_VERSION = 1  # of what is cached


@dataclass(frozen=True)
class Scores:
    """What a model answered to a file of questions, by question.

    Attributes:
        name: of the file.
        correct: index of the right option.
        likelihood: index of the option found most likely.
        generated: index of the option written, -1 for none.
        probability: of the right option among the options, by their likelihoods.
        chance: accuracy of guessing.
    """

    name: str
    correct: list[int]
    likelihood: list[int]
    generated: list[int]
    probability: list[float]
    chance: float

    @property
    def likelihood_accuracy(self) -> float:
        """Share of the questions whose most likely option is right."""
        return _share_equal(self.likelihood, self.correct)

    @property
    def generated_accuracy(self) -> float:
        """Share of the questions whose written answer is right."""
        return _share_equal(self.generated, self.correct)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 12,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score a file of questions.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        path: the file.
        limit: questions to take from its beginning; None: all.
        batch_size: questions a forward pass.
        max_new_tokens: tokens to generate at most.
        cache: take the result from disk where this very model has answered these very questions,
            and store it there.
        progress: called with questions done and their number; a bar is shown where None.

    Raises:
        UserError: when the file is not one of questions.
    """
    questions = read_questions(path, limit)
    stored = _cache_file(model, tokenizer, questions, max_new_tokens) if cache else None
    if stored is not None and stored.is_file():
        return Scores(**json.loads(stored.read_text(encoding="utf-8")))
    name = _name_of(Path(path))
    training = model.training
    model.eval()
    try:
        with kept_updates(model):
            scored, generated = _answer(
                model, tokenizer, questions, batch_size, max_new_tokens, name, progress
            )
    finally:
        model.train(training)
    chance = sum(1 / len(question.options) for question in questions) / len(questions)
    correct = [question.correct for question in questions]
    likelihood = [int(of_options.argmax()) for of_options in scored]
    probability = [float(o.softmax(0)[c]) for o, c in zip(scored, correct, strict=True)]
    scores = Scores(name, correct, likelihood, generated, probability, chance)
    if stored is not None:
        write_atomically(stored, json.dumps(asdict(scores)).encode())
    return scores


def table(rows: Sequence[tuple[str, Sequence[Scores]]]) -> str:
    """Accuracies as text: a line for each of the ``(label, scores)`` and file."""
    lines = [f"{'file':28} {'model':10} {'likelihood':>10} {'generated':>10} {'chance':>7}   n"]
    for scores in zip(*(found for _, found in rows), strict=True):
        for (label, _), one in zip(rows, scores, strict=True):
            lines.append(
                f"{one.name[-28:]:28} {label:10} {one.likelihood_accuracy:10.1%} "
                f"{one.generated_accuracy:10.1%} {one.chance:7.1%}   {len(one.correct)}"
            )
    return "\n".join(lines)


def first_option(text: str, options: Sequence[str]) -> int:
    """Index of the option that occurs first in a text, whatever the case; -1 where none does.

    Where two begin at one place the longer one counts.
    """
    found: list[tuple[int, int, int]] = []
    for index, option in enumerate(options):
        match = re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text, re.IGNORECASE)
        if match:
            found.append((match.start(), -len(option), index))
    return min(found)[2] if found else -1


@dataclass(frozen=True)
class _Tokens:
    """A question as tokens: the prompt, and each answer after it."""

    prompt: list[int]
    answers: list[list[int]]

    @property
    def shared(self) -> int:
        """Tokens that all answers begin with."""
        same = 0
        for column in zip(*self.answers, strict=False):
            if len(set(column)) > 1:
                break
            same += 1
        return same

    @property
    def decided_at_once(self) -> bool:
        """Whether one token after the shared ones tells all options apart."""
        return all(len(answer) == self.shared + 1 for answer in self.answers)


def _answer(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    name: str,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Tensor], list[int]]:
    """Log-likelihoods of the options, and the written option, of each question."""
    tokens = [_tokenise(tokenizer, question) for question in questions]
    # Of like length side by side, so that little is padded; the longest first, which needs most
    # memory.
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i].prompt), reverse=True)
    likelihoods: dict[int, Tensor] = {}
    generated: dict[int, int] = {}
    device = next(model.parameters()).device
    bar = tqdm(total=len(tokens), desc=name, unit="q", leave=False, disable=progress is not None)
    done = 0
    for chosen in _chunks(order, batch_size):
        batch = [tokens[index] for index in chosen]
        prompts = _Prefix.read(model, [t.prompt for t in batch], tokenizer.pad_token_id, device)
        scored = _score_options(model, prompts, batch)
        texts = tokenizer.batch_decode(
            _generate(model, prompts, tokenizer, max_new_tokens), skip_special_tokens=True
        )
        for index, of_options, text in zip(chosen, scored, texts, strict=True):
            likelihoods[index] = of_options.cpu()
            generated[index] = first_option(text, questions[index].options)
        done += len(chosen)
        bar.update(len(chosen))
        if progress is not None:
            progress(done, len(tokens))
    bar.close()
    return [likelihoods[i] for i in range(len(tokens))], [generated[i] for i in range(len(tokens))]


def _tokenise(tokenizer: Any, question: Question) -> _Tokens:
    prompt = render_prompt(tokenizer, [{"role": "user", "content": question.prompt}])
    answers = [encode_text(tokenizer, answer) for answer in question.answers]
    if any(a != b and a == b[: len(a)] for a in answers for b in answers):
        # One option begins another: what comes after the shorter one decides.
        answers = [[*answer, tokenizer.eos_token_id] for answer in answers]
    return _Tokens(encode_text(tokenizer, prompt), answers)


@dataclass
class _Prefix:
    """Prompts that a model has read: what it keeps of them, and what it expects next.

    Attributes:
        cache: keys and values, whose kind is the model's own.
        mask: (B, T), 0 on the padding at the left.
        log_p: (B, V) of the next token.
    """

    cache: Any
    mask: Tensor
    log_p: Tensor

    @classmethod
    def read(
        cls, model: nn.Module, prompts: Sequence[list[int]], pad_id: int, device: torch.device
    ) -> _Prefix:
        length = max(map(len, prompts))
        ids = torch.tensor([[pad_id] * (length - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor(
            [[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device
        )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        # Not the number 1: of a slice of the hidden states the head's product copies its weight
        # for each row, which takes most of the time on a CPU.
        last = torch.tensor([length - 1], device=device)
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
            logits_to_keep=last,
        )  # fmt: skip
        return cls(out.past_key_values, mask, out.logits[:, -1].float().log_softmax(-1))

    def go_on(self, model: nn.Module, ids: Tensor, cache: Any, repeats: int = 1) -> Tensor:
        """Log-probabilities (B, T, V) after each of further tokens; ``cache`` grows by them."""
        mask = self.mask.repeat_interleave(repeats, 0)
        seen = cache.get_seq_length() - mask.shape[1]  # tokens read after the prompts
        start = mask.sum(1, keepdim=True) + seen
        positions = start + torch.arange(ids.shape[1], device=ids.device)
        ones = mask.new_ones(mask.shape[0], seen + ids.shape[1])
        out = model(
            input_ids=ids, attention_mask=torch.cat([mask, ones], 1), position_ids=positions,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return out.logits.float().log_softmax(-1)


def _score_options(model: nn.Module, prompts: _Prefix, batch: Sequence[_Tokens]) -> list[Tensor]:
    """Log-likelihood of each option of each question, up to what all options share."""
    cache = copy.deepcopy(prompts.cache)
    if not all(tokens.decided_at_once for tokens in batch):
        return _score_whole_answers(model, prompts, batch, cache)
    log_p = prompts.log_p
    if any(tokens.shared for tokens in batch):
        after = prompts.go_on(model, _pad([t.answers[0][: t.shared] for t in batch], log_p), cache)
        rows = zip(batch, log_p, after, strict=True)
        log_p = torch.stack([row[t.shared - 1] if t.shared else first for t, first, row in rows])
    return [
        row[[answer[-1] for answer in tokens.answers]]
        for tokens, row in zip(batch, log_p, strict=True)
    ]


def _score_whole_answers(
    model: nn.Module, prompts: _Prefix, batch: Sequence[_Tokens], cache: Any
) -> list[Tensor]:
    most = max(len(tokens.answers) for tokens in batch)
    cache.batch_repeat_interleave(most)
    answers = [tokens.answers[min(i, len(tokens.answers) - 1)] for tokens in batch
               for i in range(most)]  # fmt: skip
    ids = _pad(answers, prompts.log_p)
    first = prompts.log_p.repeat_interleave(most, 0)[:, None]
    log_p = torch.cat([first, prompts.go_on(model, ids, cache, most)[:, :-1]], 1)
    of_tokens = log_p.gather(2, ids[:, :, None]).squeeze(2)
    sums = [float(row[: len(answer)].sum()) for row, answer in zip(of_tokens, answers, strict=True)]
    scores = torch.tensor(sums).view(len(batch), most)
    return [row[: len(t.answers)] for t, row in zip(batch, scores, strict=True)]


def _generate(
    model: nn.Module, prompts: _Prefix, tokenizer: Any, max_new_tokens: int
) -> list[list[int]]:
    """Greedy continuations, each up to its end token."""
    written = prompts.log_p.argmax(-1)[:, None]
    while written.shape[1] < max_new_tokens and not _all_ended(written, tokenizer.eos_token_id):
        log_p = prompts.go_on(model, written[:, -1:], prompts.cache)
        written = torch.cat([written, log_p[:, -1].argmax(-1)[:, None]], 1)
    end = tokenizer.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in written.tolist()]


def _all_ended(written: Tensor, eos_id: int) -> bool:
    return bool((written == eos_id).any(1).all())


def _pad(rows: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """Rows of tokens padded on the right, where nothing that counts sees the padding."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True).to(like.device)


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _share_equal(given: Sequence[int], wanted: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(given, wanted, strict=True)) / len(wanted)


def _name_of(path: Path) -> str:
    """File name with its folder: data sets are often ``NAME/test.json``."""
    return "/".join(path.resolve().parts[-2:])


def _cache_file(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int
) -> Path | None:
    """Where the answers of this very model to these very questions are kept."""
    folder = cache_dir()
    if folder is None:
        return None
    digest = hashlib.sha256()
    adapted = [
        (str(module.active_adapters), module.disable_adapters)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
    ]
    described = [
        _VERSION, max_new_tokens, tokenizer.chat_template, [asdict(q) for q in questions],
        str(getattr(model, "config", "")), str(getattr(model, "peft_config", "")), adapted,
    ]  # fmt: skip
    digest.update(json.dumps(described, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.view(-1).view(torch.uint8).numpy().data)
    return folder / "evaluations" / f"{digest.hexdigest()}.json"
