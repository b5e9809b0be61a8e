"""The commands under ``nora``: what is done beside and after a single training run."""

import argparse
import json
import os
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nora_diffusion import __version__
from nora_diffusion.bench import command as bench
from nora_diffusion.config import RUN_CONFIG, DreamboothConfig, UserError
from nora_diffusion.presets import PRESETS
from nora_diffusion.run_command import read_command_line, settle_and_run
from nora_diffusion.run_folder import check_out
from nora_diffusion.schema import list_keys
from nora_diffusion.settings import part_overrides, quote, to_toml
from nora_diffusion.vision_language_config import VisionLanguageConfig


def run(argv: Sequence[str]) -> int:
    """Parse and run one ``nora`` command; returns its exit code."""
    given = argparse.Namespace(argv=list(argv), overrides=[])
    if list(argv[:1]) == ["webui"]:  # a program of its own: this package knows nothing of it
        return _webui(argv[1:])
    if list(argv[:1]) == ["llm"]:  # its flags are those of its schema
        from nora_diffusion.language_command import train

        return train(argv[1:])
    if list(argv[:1]) == ["vlm"]:  # its flags are those of its schema
        return _vlm(argv[1:])
    if list(argv[:1]) == ["campaign"]:
        argv, given.overrides = part_overrides(argv)
    args = _parser().parse_args(argv, given)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nora",
        description="Use adapters: make pictures, convert, inspect; train many.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Any], int], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    where = "folder of a run or an export, or adapter file"
    sample = command("sample", _sample, "make pictures with an adapter")
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

    _add_eval(command("eval", _eval, "measure a run by the DreamBooth protocol"))

    export = command("export", _export, "write an adapter as an exact LoRA for other programs")
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

    info = command("info", _info, "show what an adapter file says of itself")
    info.add_argument("source", metavar="RUN_OR_FILE", help=where)
    info.add_argument("--base", help="base model to check the recorded fingerprints against")
    info.add_argument("--json", action="store_true", help="everything, as JSON")

    inspect = command("inspect", _inspect, "show what an adapter moved, or how two overlap")
    inspect.add_argument("source", metavar="RUN_OR_FILE", help=where)
    inspect.add_argument("other", metavar="OTHER", nargs="?", help="a second one, to compare with")
    inspect.add_argument(
        "--base", help="base model: for sizes relative to its weights, and to measure a blend"
    )
    inspect.add_argument("--out", help="folder for pictures and every number as JSON")

    targets = command("targets", _targets, "show what an adapter would train; loads no weights")
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

    plan = command("plan", _plan, "show what adapters would cost on a model; loads no weights")
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

    command("llm", lambda _: 0, "fine-tune a language model (nora llm --help)")
    score = command("llm-eval", _llm_eval, "score a language model on questions with options")
    score.add_argument(
        "source", metavar="RUN_OR_BASE", help="run folder of nora llm, or a base as in model.base"
    )
    score.add_argument("files", metavar="FILE", nargs="+", help="questions, as in eval.files")
    score.add_argument("--limit", type=_positive, help="questions of each file (default all)")
    score.add_argument("--batch-size", type=_positive, default=16, help="(default 16)")
    score.add_argument("--max-new-tokens", type=_positive, default=12, help="(default 12)")
    score.add_argument("--device", choices=_choices("model.device"), default="auto")
    score.add_argument("--json", action="store_true", help="every answer, as JSON")
    command("vlm", lambda _: 0, "adapt CLIP or a vision-language model (nora vlm --help)")
    command("webui", lambda _: 0, "serve the web app on this machine (nora webui --help)")
    bench.add_arguments(command("bench", bench.run, "compare methods on mini; resumable"))
    _add_campaign(command("campaign", _campaign, "one training run for each line of a table"))
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


def _webui(argv: Sequence[str]) -> int:
    # In place of this process, so that a signal to the command is one to the app.
    os.execv(sys.executable, [sys.executable, "-m", "webui", *argv])


def _llm_eval(args: argparse.Namespace) -> int:
    from nora_diffusion.language_command import score

    return score(args)


def _vlm(argv: Sequence[str]) -> int:
    def settle() -> tuple[VisionLanguageConfig, bool] | None:
        about = "Adapt CLIP to new classes, or a vision-language model to image instructions."
        given = read_command_line(VisionLanguageConfig, argv, about)
        if given.dry_run:
            print(to_toml(given.config))
            return None
        return given.config, given.resume

    def run(config: VisionLanguageConfig, resume: bool) -> None:
        if config.model.task == "few_shot":
            from nora_diffusion.train import clip_fewshot as recipe
        else:
            from nora_diffusion.train import vision_language as recipe
        recipe.run(config, resume=resume)

    return settle_and_run(settle, run)


def _sample(args: argparse.Namespace) -> int:
    from nora_diffusion.sampling import sample_to_folder

    _check_prompts(args.prompts)
    files = sample_to_folder(
        args.source,
        args.prompts,
        args.out,
        n=args.n,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        negative_prompt=args.negative_prompt,
        base=args.base,
        weight=args.weight,
        width=args.width,
        height=args.height,
        device=args.device,
        dtype=args.dtype or "auto",
    )
    print("\n".join(str(file) for file in files))
    return 0


def _check_prompts(prompts: Sequence[str]) -> None:
    """Refuse a second adapter, which would silently be drawn as a prompt.

    Raises:
        UserError: naming it.
    """
    from nora_diffusion.adapter.loading import FILE_NAMES

    for prompt in prompts:
        path = Path(prompt)
        try:
            is_folder = any((path / name).is_file() for name in (RUN_CONFIG, *FILE_NAMES))
            is_file = path.suffix == ".safetensors" and path.is_file()
        except OSError:  # too long for a name, as prompts are
            continue
        if is_folder or is_file:
            what = "the folder of a run or an export" if is_folder else "an adapter file"
            raise UserError(
                f"PROMPT = {quote(prompt)}: is {what}; nora sample draws with one adapter, its "
                "first argument. For another give the command again; to blend several use nora "
                "webui, or load_adapter with an adapter_name for each (docs/formats.md)"
            )


def _eval(args: argparse.Namespace) -> int:
    from nora_diffusion.evaluation.eval_run import Options, evaluate_run

    source = Path(args.source).expanduser()
    out = args.out or (source if source.is_dir() else source.parent) / "eval"
    out = out.expanduser()
    page = evaluate_run(
        Options(
            source, out, args.prompts, args.photos, args.held_out, tuple(args.backend), args.n,
            args.seed, args.steps, args.guidance, args.base, args.device, args.dtype, args.trigger,
        )
    )  # fmt: skip
    print((out / "eval.md").read_text(encoding="utf-8"))
    print(f"with the pictures: {page}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from nora_diffusion import adapter_info, export_lora
    from nora_diffusion.families.base import DTYPES
    from nora_diffusion.sampling import adapter_path

    path = adapter_path(args.source)
    base = args.base or adapter_info(path)["base"]
    if not base:
        raise UserError(f"{path}: it does not name its base model; give one with --base")
    out = Path(args.out).expanduser()
    one_file = args.layout != "peft" or out.suffix == ".safetensors"
    check_out(out, out.parent if one_file else out)
    try:
        print(export_lora(path, out, args.layout, base, DTYPES.get(args.dtype)))
    except ValueError as error:  # a layout that has no names for this model, a name for a file
        key = "--out " if str(error).startswith(f"{out}: ") else ""
        raise UserError(f"{key}{error}") from error
    return 0


def _info(args: argparse.Namespace) -> int:
    from nora_diffusion import adapter_info
    from nora_diffusion.sampling import adapter_path

    info = adapter_info(adapter_path(args.source), args.base)
    if args.json:
        print(json.dumps(info, indent=2, default=str))
        return 0
    details = ("components", "metadata")  # for --json
    for name, value in info.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} = {v}" for k, v in value.items() if v is not None)
        if name not in details:
            print(f"{name:21} {'-' if value is None else value}")
    return 0


def _targets(args: argparse.Namespace) -> int:
    from nora_diffusion.targets import lines

    for line in lines(args.model, args.targets, args.r, args.inner_r, args.modules):
        print(line)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from nora_diffusion.evaluation.inspection_command import show

    if args.out is not None:
        check_out(args.out)
    return show(args)


def _plan(args: argparse.Namespace) -> int:
    from nora_diffusion.planning.command import show

    return show(args)


def _campaign(args: argparse.Namespace) -> int:
    from nora_diffusion.campaign.runs import Options, run_campaign
    from nora_diffusion.campaign.subjects import read_table
    from nora_diffusion.campaign.summary import show_table, start_summary

    out = Path(args.out).expanduser().resolve()
    check_out(out)
    runs = read_table(args.table, args.config, args.overrides, args.preset, out)
    if args.dry_run:
        print(show_table(start_summary(runs, out), out))
        return 0
    options = Options(
        config=args.config,
        preset=args.preset,
        out=out,
        address=args.ray,
        cpus=args.cpus,
        gpus=args.gpus,
        parallel=args.parallel,
        retries=args.retries,
    )
    again = f"nora {shlex.join(args.argv)}"
    try:
        done = run_campaign(runs, options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; continue with: {again}") from None
    if not done:
        print(f"not all are done; try those again with: {again}")
    return 0 if done else 1
