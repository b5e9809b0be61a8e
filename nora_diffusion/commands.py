"""The commands under ``nora``: what is done beside and after a single training run."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nora_diffusion.bench import command as bench
from nora_diffusion.command_line import make_parser
from nora_diffusion.config import RUN_CONFIG, UserError
from nora_diffusion.run_command import read_command_line, settle_and_run
from nora_diffusion.run_folder import check_out
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
    args = make_parser(ACTIONS).parse_args(argv, given)
    return args.run(args)


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
            told = recipe(given.config).describe(given.config)
            print("\n".join(f"# {line}" for line in told))
            return None
        return given.config, given.resume

    def run(config: VisionLanguageConfig, resume: bool) -> None:
        recipe(config).run(config, resume=resume)

    def recipe(config: VisionLanguageConfig) -> Any:
        if config.model.task == "few_shot":
            from nora_diffusion.train import clip_fewshot

            return clip_fewshot
        from nora_diffusion.train import vision_language

        return vision_language

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
    from nora_diffusion.campaign.subjects import check_bases, read_table
    from nora_diffusion.campaign.summary import show_table, start_summary

    out = Path(args.out).expanduser().resolve()
    check_out(out)
    runs = read_table(args.table, args.config, args.overrides, args.preset, out)
    if args.dry_run:
        from nora_diffusion.train.memory import foresee

        check_bases(runs, args.table, lambda config: foresee(config, 1, (), 1))
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


ACTIONS = {
    "sample": _sample,
    "eval": _eval,
    "export": _export,
    "info": _info,
    "inspect": _inspect,
    "targets": _targets,
    "plan": _plan,
    "llm-eval": _llm_eval,
    "bench": bench.run,
    "campaign": _campaign,
}
"""What runs each command; ``llm``, ``vlm`` and ``webui`` parse their own arguments."""
