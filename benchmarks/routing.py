"""What `nora llm llm` makes of its base: the right desk for messages that it was not taught.

    python benchmarks/routing.py

Runs the shipped config as a user would, in a temporary folder, and records its scores before and
after, what it trained and stored, and the CPU time of it all.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import ROOT, write_result
from safetensors import safe_open


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    command = "import sys; from nora_diffusion.cli import main; sys.exit(main())"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = [sys.executable, "-c", command, "llm", "llm", "--output.dir", str(run)]
        subprocess.run(arguments, check=True, cwd=ROOT)
        (scores,) = json.loads((run / "scores.json").read_bytes())
        file = run / "adapter.safetensors"
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            trained = sum(tensors.get_tensor(name).numel() for name in names)
        size = file.stat().st_size
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    write_result(
        "routing",
        scores
        | {
            "trained_parameters": trained,
            "file_bytes": size,
            "cpu_s": round(used.ru_utime + used.ru_stime),
        },
    )


if __name__ == "__main__":
    main()
