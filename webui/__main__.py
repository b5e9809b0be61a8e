"""``nora webui``, also ``python -m webui``."""

from __future__ import annotations

import argparse
import getpass
import sys
from collections.abc import Sequence
from pathlib import Path

from nora_diffusion.config import UserError

EXPOSED = """\
{how}. Whoever has a name and password of {file} can then
  - upload photos, train and draw on this machine, and fill its disk;
  - see and delete what is under their own name, and nobody else's.
Everybody else sees the login page.{more}"""
PLAIN = " The connection is not encrypted: others on the network can read passwords and pictures."
TUNNEL = " All of it goes through a server of Gradio's, which can read it."


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and serve until Ctrl-C; returns the exit code."""
    try:
        _run(argv)
    except UserError as error:
        print(f"nora webui: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("webui", "nora_diffusion"):
            raise
        print(
            f"nora webui: error: {error.name} is not installed; "
            "run: pip install 'nora-diffusion[webui]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _run(argv: Sequence[str] | None) -> None:
    from webui.auth import add_user, read_auth_file
    from webui.paths import DataFolder

    args = _parser().parse_args(argv)
    if args.add_user is not None:
        if args.auth_file is None:
            raise UserError("--add-user: --auth-file FILE is missing; it says where to write")
        is_new = add_user(args.auth_file, args.add_user, _ask)
        print(f"{args.auth_file}: {args.add_user} {'added' if is_new else 'has a new password'}")
        return
    for flag, how in (("listen", "open to the network"), ("share", "open to the internet")):
        if getattr(args, flag) and args.auth_file is None:
            raise UserError(
                f"--{flag}: the app would be {how} to anybody; give --auth-file FILE as well "
                "(make it with: nora webui --add-user NAME --auth-file FILE)"
            )
    users = None if args.auth_file is None else read_auth_file(args.auth_file)
    for flag, how, more in (
        (
            "listen",
            f"--listen: every machine that reaches this one can open port {args.port}",
            PLAIN,
        ),
        ("share", "--share: everybody who knows its address can open the app", TUNNEL),
    ):
        if getattr(args, flag):
            print(EXPOSED.format(how=how, file=args.auth_file, more=more), flush=True)
    folder = DataFolder.open(args.data_dir)

    from webui.serve import Serving, serve

    host = "0.0.0.0" if args.listen else "127.0.0.1"
    serve(folder, Serving(host=host, port=args.port, users=users, share=args.share))


def _parser() -> argparse.ArgumentParser:
    from webui.paths import default_data_dir

    parser = argparse.ArgumentParser(
        prog="nora webui", description="Serve the web app on this machine.", allow_abbrev=False
    )
    parser.add_argument("--port", type=_port, default=7860, help="TCP port (default 7860)")
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        default=str(default_data_dir()),
        help="folder for everything the app keeps (default %(default)s)",
    )
    parser.add_argument(
        "--auth-file",
        metavar="FILE",
        type=Path,
        help="ask for a name and password; each name has subjects, jobs and adapters of its own",
    )
    parser.add_argument(
        "--add-user",
        metavar="NAME",
        help="ask for a password, write both to --auth-file, and end",
    )
    parser.add_argument(
        "--listen",
        action="store_true",
        help="let other machines connect (0.0.0.0); needs --auth-file",
    )
    parser.add_argument(
        "--share",
        action="store_true",
        help="open a public address through Gradio's tunnel; needs --auth-file",
    )
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 1 to 65535")
    return int(text)


def _ask(question: str) -> str:
    if sys.stdin.isatty():
        return getpass.getpass(question)
    return sys.stdin.readline().rstrip("\r\n")


if __name__ == "__main__":
    sys.exit(main())
