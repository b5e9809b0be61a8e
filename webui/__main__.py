"""``nora webui``, also ``python -m webui``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nora_diffusion.config import UserError
from webui.paths import DataFolder, default_data_dir


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and serve until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="nora webui", description="Serve the web app on this machine.", allow_abbrev=False
    )
    parser.add_argument("--port", type=int, default=7860, help="TCP port (default 7860)")
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        default=str(default_data_dir()),
        help="folder for everything the app keeps (default %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        folder = DataFolder.open(args.data_dir)
        from webui.serve import Serving, serve

        serve(folder, Serving(port=args.port))
    except UserError as error:
        print(f"nora webui: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
