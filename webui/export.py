"""``nora export`` as a process of its own: it loads torch and a base model, and then ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from nora_diffusion.config import UserError
from webui.paths import DataFolder

COMMAND = (
    sys.executable,
    "-P",  # the working folder holds what people uploaded: nothing is imported from there
    "-c",
    "from nora_diffusion.cli import main; raise SystemExit(main())",
)
_PREFIX = "nora: error: "
LIMIT_S = 1800.0


def export(folder: DataFolder, source: Path, out: Path, layout: str, base: str) -> None:
    """Write an adapter as a LoRA in a layout.

    Args:
        folder: the data folder.
        source: native adapter file.
        out: file to write.
        layout: as ``nora export`` takes it.
        base: base model it was trained on.

    Raises:
        UserError: with the command's own sentence, such as that a family has no such layout.
    """
    options = (f"--out={out}", f"--layout={layout}", f"--base={base}")
    try:
        run = subprocess.run(
            [*COMMAND, "export", str(source), *options],
            cwd=folder.root,
            env=os.environ | {"NORA_CACHE_DIR": str(folder.part("cache"))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError("the export took more than half an hour and was ended") from None
    if run.returncode != 0:
        told = run.stderr.rpartition(_PREFIX)[2].strip() if _PREFIX in run.stderr else ""
        last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise UserError(f"the adapter cannot be exported: {told or last}")
