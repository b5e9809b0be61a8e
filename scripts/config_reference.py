"""Write docs/config.md, the reference of all settings, from the schema."""

from pathlib import Path

from nora_diffusion.config import DreamboothConfig
from nora_diffusion.presets import PRESETS
from nora_diffusion.schema import list_keys
from nora_diffusion.settings import quote

PAGE = Path(__file__).parent.parent / "docs" / "config.md"

INTRODUCTION = """\
# Settings of nora-dreambooth

Written by `python scripts/config_reference.py` from the schema in `nora_diffusion/config.py`.

    nora-dreambooth CONFIG [--preset P] [--section.key value ...] [--dry-run] [--resume DIR]

`CONFIG` is a TOML file or the name of one in `configs/`, such as `mini`. The command line goes
before a [preset](#presets), the preset before the file, the file before the defaults below. Paths
are relative to the folder the command is run in. `docs/training.md` says more about optimisers,
steps and logs.

- `--dry-run` prints every setting as it would be used, and what is in the photo folder
  ([data.md](data.md)).
- A list is given by repeating its flag, or as a TOML array: `--sample.prompts '["one", "two"]'`.
- A value in a list of tables is `--data.subjects[0].repeats 3`, counted from 0.
- `none` unsets a setting that allows it; in a file it is the text `"none"`.
- `--resume DIR` takes the settings from `DIR/config.toml`, so `CONFIG` can be left out. Only the
  settings marked *yes* under "resume" may then be changed: the others would contradict the steps
  already done. With a `cosine` or `linear` schedule a new `train.steps` moves the end of the
  schedule for the steps still to come. If `DIR` holds no run yet, `CONFIG` starts one there.
- Unknown settings and values that are not allowed are errors, all reported at once.
"""


PRESETS_INTRODUCTION = """
## presets

`--preset P` lays these settings over the file, for a card with that much memory. No preset changes
the optimiser: a NoRA adapter's state is a few MB, whatever keeps it.
"""


def page() -> str:
    """The page's text."""
    lines = [INTRODUCTION]
    section = None
    for key in list_keys(DreamboothConfig):
        if key.section is not section:
            section = key.section
            name = key.name.split(".")[0]
            lines += [f"\n## {name}\n", f"{section.__doc__}\n"]
            lines += ["| key | allowed | default | resume | meaning |", "|---|---|---|---|---|"]
        unit = f" ({key.unit})" if key.unit else ""
        default = "*required*" if key.required else f"`{quote(key.default)}`"
        resume = "yes" if key.resume else ""
        lines.append(f"| `{key.name}` | {key.allowed}{unit} | {default} | {resume} | {key.help} |")
    lines.append(PRESETS_INTRODUCTION)
    lines += ["| preset | setting | why |", "|---|---|---|"]
    for name, choices in PRESETS.items():
        lines += [f"| `{name}` | `{c.key} = {quote(c.value)}` | {c.why} |" for c in choices]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
