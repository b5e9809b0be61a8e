"""``nora llm`` and ``nora llm-eval``; whatever is heavy is imported inside them."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from nora_diffusion.language_config import LanguageConfig
from nora_diffusion.run_command import read_command_line, settle_and_run
from nora_diffusion.run_config import RUN_CONFIG, load_run
from nora_diffusion.settings import to_toml


def train(argv: Sequence[str]) -> int:
    """``nora llm CONFIG [--section.key value ...] [--dry-run] [--resume DIR]``."""

    def run(config: LanguageConfig, resume: bool) -> None:
        from nora_diffusion.train import language

        language.run(config, resume=resume)

    return settle_and_run(partial(_settle, argv), run)


def score(args: argparse.Namespace) -> int:
    """``nora llm-eval RUN_OR_BASE FILE ...``."""
    from nora_diffusion.evaluation.multiple_choice import evaluate, table
    from nora_diffusion.evaluation.questions import read_questions
    from nora_diffusion.families.base import resolve_device
    from nora_diffusion.language_model import load_model, load_run_model, load_tokenizer

    for file in args.files:  # before minutes are spent on loading
        read_questions(file, args.limit)
    device = resolve_device(args.device)
    folder = Path(args.source).expanduser()
    if (folder / RUN_CONFIG).is_file():
        config = load_run(LanguageConfig, folder)
        tokenizer = load_tokenizer(config.model.base)
        model = load_run_model(folder, config, device)
    else:
        tokenizer = load_tokenizer(args.source, "RUN_OR_BASE")
        model = load_model(args.source, "auto", device, given_as="RUN_OR_BASE")
    scores = [
        evaluate(
            model,
            tokenizer,
            file,
            limit=args.limit,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
        )
        for file in args.files
    ]
    if args.json:
        print(json.dumps([asdict(one) for one in scores]))
    else:
        print(table([(folder.name[-10:], scores)]))
    return 0


def _settle(argv: Sequence[str]) -> tuple[LanguageConfig, bool] | None:
    """The config to train with, and whether it continues a run; None after a dry run."""
    about = "Fine-tune a language model on instructions, and score it before and after."
    given = read_command_line(LanguageConfig, argv, about)
    if given.dry_run:
        from nora_diffusion.train.language import describe

        print(to_toml(given.config))
        print("\n".join(f"# {line}" for line in describe(given.config)))
        return None
    return given.config, given.resume
