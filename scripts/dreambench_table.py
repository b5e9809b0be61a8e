"""The table for ``nora campaign`` of the DreamBooth dataset: one subject a line.

python scripts/dreambench_table.py data/dreambooth/dataset > subjects.csv
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

CLASSES = "prompts_and_classes.txt"


def read_classes(path: Path) -> dict[str, str]:
    """Class noun of each subject, from the lines between the header and the prompts."""
    lines = path.read_text(encoding="utf-8").partition("subject_name,class")[2].splitlines()[1:]
    classes: dict[str, str] = {}
    for line in lines:
        subject, comma, noun = line.partition(",")
        if not comma:
            break
        classes[subject.strip()] = noun.strip()
    return classes


def rows(dataset: Path, photos: Path) -> Iterator[tuple[str, str, str]]:
    """Folder of photos, class noun and name of each subject."""
    for name, noun in read_classes(dataset / CLASSES).items():
        if not (photos / name).is_dir():
            sys.exit(f"{photos / name}: no such folder; it is a subject of {dataset / CLASSES}")
        yield str(photos / name), noun, name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path, help=f"folder with {CLASSES} and the subjects")
    parser.add_argument(
        "--photos", type=Path, help="folder with other photos of the subjects (default: dataset)"
    )
    args = parser.parse_args()
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(("subject", "class_name", "name"))
    table.writerows(list(rows(args.dataset, args.photos or args.dataset)))


if __name__ == "__main__":
    main()
