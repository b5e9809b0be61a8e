"""Adapters as files to download, in the layouts of other programs.

``nora export`` makes them as a process of its own: it loads torch and a base model, and then ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

from nora_diffusion.config import UserError
from webui.library_files import LORA, LibraryFiles, copy_whole
from webui.models import Adapter
from webui.paths import DataFolder, file_stem

Layout = Literal["native", "diffusers", "kohya"]

COMMAND = (
    sys.executable,
    "-P",  # the working folder holds what people uploaded: nothing is imported from there
    "-c",
    "from nora_diffusion.cli import main; raise SystemExit(main())",
)
_PREFIX = "nora: error: "
LIMIT_S = 1800.0


class Exports:
    """The files that were asked for; each is made once, and kept until the adapter changes."""

    def __init__(self, files: LibraryFiles) -> None:
        self.files = files
        self._one_at_a_time = threading.Lock()  # each loads a base model

    def file(self, adapter: Adapter, layout: Layout) -> Path:
        """The file in a layout, under a name that says what it is.

        ``native`` is the file as it is; the others are made by ``nora export`` where the run did
        not leave them.

        Raises:
            UserError: when its family has no such layout.
        """
        if layout != "native" and adapter.kind == "lora":
            raise UserError("this is a LoRA already; only NoRA adapters can be exported as one")
        ending = f"-lora-{layout}" if layout != "native" else "-nora" * (adapter.kind == "nora")
        place = self.files.exports(adapter.id) / layout
        named = place / f"{file_stem(adapter.name)}{ending}.safetensors"
        source = self.files.adapter(adapter)
        left_by_run = source.with_name(LORA)
        with self._one_at_a_time:
            made = next(place.glob("*.safetensors"), None)
            if made is not None:
                made.replace(named)  # the adapter may have been renamed since
                return named
            place.mkdir(parents=True, exist_ok=True)
            if layout == "native":
                copy_whole(source, named)
            elif layout == "diffusers" and left_by_run.is_file():
                copy_whole(left_by_run, named)
            else:
                _export(self.files.folder, source, named, layout, adapter.base)
        return named


def _export(folder: DataFolder, source: Path, out: Path, layout: str, base: str) -> None:
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
