"""The command line of ``nora``: every command's arguments; nothing heavy is imported."""

import argparse
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nora_diffusion import __version__
from nora_diffusion.bench import command as bench
from nora_diffusion.config import DreamboothConfig
from nora_diffusion.presets import PRESETS
from nora_diffusion.schema import list_keys

Action = Callable[[Any], int]


def make_parser(actions: Mapping[str, Action]) -> argparse.ArgumentParser:
    """The parser of ``nora``.

    Args:
        actions: by the name of a command, what runs it and returns its exit code; commands that
            have none are parsed elsewhere, and stand here for the help.
    """
    parser = argparse.ArgumentParser(
        prog="nora",
        description="Use adapters: make pictures, convert, inspect; train many.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(run=actions.get(name))
        return added

    where = "folder of a run or an export, or adapter file"
    sample = command("sample", "make pictures with an adapter")
    sample.add_argument("source", metavar="RUN_OR_FILE", help=where)
    sample.add_argument(
        "prompts", metavar="PROMPT", nargs="+", help="{trigger} and {class_name} are filled in"
    )
    sample.add_argument("--n", type=_positive, default=4, help="pictures a prompt (default 4)")
    sample.add_argument("--seed", type=int, default=0, help="of the first picture (default 0)")
    sample.add_argument(
        "--out",
        default="samples",
        help="folder for the pictures (default samples); those that are there are kept",
    )
    sample.add_argument(
        "--steps", type=_positive, help="denoising steps (default: the run's, or 25)"
    )
    sample.add_argument("--guidance", type=float, help="guidance scale (default: the run's, or 5)")
    sample.add_argument("--negative-prompt", help="what the pictures should not show")
    sample.add_argument("--weight", type=float, default=1.0, help="of the adapter (default 1)")
    sample.add_argument("--width", type=_positive, help="in px (default: the base model's own)")
    sample.add_argument("--height", type=_positive, help="in px (default: the base model's own)")
    sample.add_argument("--device", choices=_choices("model.device"), default="auto")

    _add_eval(command("eval", "measure a run by the DreamBooth protocol"))

    export = command("export", "write an adapter as an exact LoRA for other programs")
    export.add_argument("source", metavar="RUN_OR_FILE", help=where)
    export.add_argument(
        "--out", required=True, help=".safetensors file, or folder for the peft layout"
    )
    export.add_argument(
        "--layout",
        choices=("diffusers", "kohya", "peft"),
        default="diffusers",
        help="kohya: also for A1111 and ComfyUI (default diffusers)",
    )
    for subparser in (sample, export):
        subparser.add_argument("--base", help="base model (default: the one it was trained on)")
        subparser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="number format")

    info = command("info", "show what an adapter file says of itself")
    info.add_argument("source", metavar="RUN_OR_FILE", help=where)
    info.add_argument("--base", help="base model to check the recorded fingerprints against")
    info.add_argument("--json", action="store_true", help="everything, as JSON")

    inspect = command("inspect", "show what an adapter moved, or how two overlap")
    inspect.add_argument("source", metavar="RUN_OR_FILE", help=where)
    inspect.add_argument("other", metavar="OTHER", nargs="?", help="a second one, to compare with")
    inspect.add_argument(
        "--base", help="base model: for sizes relative to its weights, and to measure a blend"
    )
    inspect.add_argument("--out", help="folder for pictures and every number as JSON")

    targets = command("targets", "show what an adapter would train; loads no weights")
    targets.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="mini",
        help="shipped config, diffusers or transformers model, or .gguf file (default mini)",
    )
    targets.add_argument(
        "--targets",
        metavar="T",
        nargs="+",
        default=(),
        help="attention, all-linear, names or endings of modules, or one regular expression "
        "(default: all that has a name in the settings)",
    )
    targets.add_argument("--modules", action="store_true", help="name every module")

    plan = command("plan", "show what adapters would cost on a model; loads no weights")
    plan.add_argument(
        "models", metavar="MODEL", nargs="+", help="as of nora targets; several: one table"
    )
    plan.add_argument(
        "--targets", metavar="T", nargs="+", default=("attention",), help="as of nora targets"
    )
    for subparser in (targets, plan):
        subparser.add_argument("--r", type=_positive, default=64, help="outer rank (default 64)")
        subparser.add_argument(
            "--inner-r", type=_positive, default=8, help="inner rank (default 8)"
        )
    plan.add_argument("--lora-r", type=_positive, default=16, help="rank of LoRA (default 16)")
    plan.add_argument(
        "--lora-xs-r", type=_positive, help="rank of LoRA-XS (default: trains about what NoRA does)"
    )
    plan.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="(bf16)")
    plan.add_argument("--batch", type=_positive, default=1, help="samples a step (default 1)")
    plan.add_argument(
        "--tokens", type=_positive, default=512, help="of a text, language models (default 512)"
    )
    plan.add_argument(
        "--resolution", type=_positive, help="in px, diffusion models (default: the model's own)"
    )
    plan.add_argument("--json", action="store_true", help="every number, as JSON")

    command("llm", "fine-tune a language model (nora llm --help)")
    score = command("llm-eval", "score a language model on questions with options")
    score.add_argument(
        "source", metavar="RUN_OR_BASE", help="run folder of nora llm, or a base as in model.base"
    )
    score.add_argument("files", metavar="FILE", nargs="+", help="questions, as in eval.files")
    score.add_argument("--limit", type=_positive, help="questions of each file (default all)")
    score.add_argument("--batch-size", type=_positive, default=16, help="(default 16)")
    score.add_argument("--max-new-tokens", type=_positive, default=12, help="(default 12)")
    score.add_argument("--device", choices=_choices("model.device"), default="auto")
    score.add_argument("--json", action="store_true", help="every answer, as JSON")
    command("vlm", "adapt CLIP or a vision-language model (nora vlm --help)")
    command("webui", "serve the web app on this machine (nora webui --help)")
    comparing = command("bench", "compare methods on mini; resumable")
    bench.add_arguments(comparing, _positive, _choices("model.device"))
    _add_campaign(command("campaign", "one training run for each line of a table"))
    return parser


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Backends: effnet, mini_clip (offline); dino, dinov2, clip (from the hub, or "
        "NAME=FOLDER). The same command again goes on with the pictures that are missing."
    )
    parser.add_argument("source", metavar="RUN_OR_FILE", help="folder of a run, or adapter file")
    parser.add_argument("--held-out", type=Path, help="folder of photos that were not trained on")
    parser.add_argument("--trigger", help="which subject, of several (default: the first)")
    parser.add_argument("--photos", type=Path, help="training photos (default: those of the run)")
    parser.add_argument("--out", type=Path, help="folder of the report (default RUN/eval)")
    parser.add_argument(
        "--prompts", help="mini, object, live, or a file of one a line (default: by base and class)"
    )
    parser.add_argument("--n", type=_positive, default=4, help="pictures a prompt (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default 0)")
    parser.add_argument("--steps", type=_positive, help="denoising steps (default: the run's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the run's)")
    parser.add_argument(
        "--backend", nargs="+", default=(), metavar="NAME",
        help="what measures (default: effnet mini_clip for mini, else dino clip)",
    )  # fmt: skip
    parser.add_argument("--base", help="base model (default: the one it was trained on)")
    parser.add_argument("--device", choices=_choices("model.device"), default="auto")
    parser.add_argument("--dtype", choices=_choices("model.dtype"), default="auto")


def _add_campaign(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s SUBJECTS.csv [--config CONFIG] [--out DIR] [--section.key value ...]"
    parser.epilog = (
        "Columns: subject (folder of photos), class_name; and any of trigger, name (of the run "
        "folder) and section.key, as of nora-dreambooth. The same command again goes on: what is "
        "finished is skipped, the rest resumed. On several machines table, photos, --out and the "
        "folder the command is started in must be on a file system they all share."
    )
    parser.add_argument("table", metavar="SUBJECTS.csv", help="one subject a line, below a header")
    parser.add_argument(
        "--config", default="mini", help="CONFIG of nora-dreambooth for all runs (default mini)"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="as of nora-dreambooth")
    parser.add_argument(
        "--out", default="runs/campaign", help="folder of the run folders (default runs/campaign)"
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="of a Ray cluster, or auto (default: this machine alone)"
    )
    parser.add_argument(
        "--retries",
        type=_retries,
        default=2,
        metavar="N",
        help="further attempts after a crash (default 2); none after an error in the settings",
    )
    parser.add_argument(
        "--parallel", type=_positive, metavar="N", help="most runs at a time (default: what fits)"
    )
    parser.add_argument(
        "--cpus", type=_positive, default=1, metavar="N", help="cores and threads a run (default 1)"
    )
    parser.add_argument(
        "--gpus",
        type=_share,
        metavar="N",
        help="GPUs a run, 0.5: two runs share one (default 1 where there are GPUs)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check all lines, show what is left")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _retries(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 99:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 to 99")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not (0 <= value < 1 or value >= 1 and value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text}: must be below 1, or a whole number")
    return value


def _choices(name: str) -> tuple[str, ...]:
    """The choices of a key of the schema."""
    key = next(key for key in list_keys(DreamboothConfig) if key.name == name)
    return typing.get_args(key.field.annotation)
