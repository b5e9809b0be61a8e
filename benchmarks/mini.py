"""Does the shipped mini draw what a prompt names, and how well does its autoencoder decode?

    python benchmarks/mini.py [--photos FOLDER]

The score of the recipe (`python -m nora_diffusion.mini score`), recorded.
"""

import argparse
import tempfile
from pathlib import Path

from _common import write_result

from nora_diffusion.mini.__main__ import ASSETS, PRESETS, default_work_folder
from nora_diffusion.mini.score import score

RECIPE = PRESETS["cpu"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="real photos for the autoencoder's PSNR")
    parser.add_argument("--work", type=Path, default=default_work_folder() / RECIPE.name)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = score(ASSETS, args.work, Path(folder), RECIPE.concept_set, photos=args.photos)
    print(write_result("mini", found))


if __name__ == "__main__":
    main()
