"""Does the shipped mini draw what a prompt names, and how well does its autoencoder decode?

    python benchmarks/mini.py [--preset gpu] [--prompts 200] [--photos FOLDER]

The score of the recipe (`python -m nora_diffusion.mini score`), recorded.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from _common import write_result

from nora_diffusion.mini.__main__ import PRESETS, SHIPPED, default_work_folder
from nora_diffusion.mini.score import score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="gpu: mini-128")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--photos", type=Path, help="real photos for the autoencoder's PSNR")
    parser.add_argument("--work", type=Path, default=default_work_folder())
    args = parser.parse_args()
    recipe, shipped = PRESETS[args.preset], SHIPPED[args.preset]
    work = args.work / recipe.name
    with tempfile.TemporaryDirectory() as folder:
        found = score(shipped, work, Path(folder), recipe.concept_set, args.prompts, args.photos)
        shutil.copy(Path(folder) / "sheet.png", work / "sheet.png")
    print(write_result(shipped.name, found))


if __name__ == "__main__":
    main()
