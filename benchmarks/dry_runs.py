"""What ``nora-dreambooth --dry-run`` says of memory, for README's command and the picture recipes.

    python benchmarks/dry_runs.py

Writes ``benchmarks/results/dry_runs.json``, from which README and docs/recipes.md are rendered.
Of the photos only the number matters: the sample subject stands for every recipe's own.
"""

import contextlib
import io
import shlex

from _common import write_result

from nora_diffusion.cli import main_dreambooth

SUBJECT = "--data.subject sample_data/subject --data.class_name dog"
COMMANDS = {
    "sd15": f"sd15 {SUBJECT} --output.dir runs/dog15 --model.dtype bf16",
    **{
        name: f"recipes/{name} {SUBJECT} --output.dir runs/{name}"
        for name in ("peft_image_gen", "dreambench_sd15", "dreambench_sdxl", "tlora_single_image")
    },
}


def memory_lines(command: str) -> list[str]:
    """The lines on memory that a dry run prints, without the marks of a comment."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main_dreambooth([*shlex.split(command), "--dry-run"])
    if code:
        raise SystemExit(code)
    lines = [line.removeprefix("# ") for line in said.getvalue().splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("predicted memory"))
    return [lines[first], *(line for line in lines[first + 1 :] if line.startswith("  "))]


def main() -> None:
    """Ask for every command's memory and write the result."""
    results = {
        name: {
            "command": f"nora-dreambooth {command} --dry-run",
            "memory": memory_lines(f"{command} --model.device cpu"),
        }
        for name, command in COMMANDS.items()
    }
    write_result("dry_runs", results, "Predicted from configs; nothing was loaded.")


if __name__ == "__main__":
    main()
