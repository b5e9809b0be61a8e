"""Serving the app: where, for whom, and what it never does (analytics, files from elsewhere)."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import signal
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock, Timeout
from starlette.middleware import Middleware

from nora_diffusion.config import UserError
from webui.auth import Logins
from webui.gate import Gate
from webui.paths import PARTS, DataFolder
from webui.studio import Studio

if TYPE_CHECKING:
    import gradio as gr

UPLOAD_LIMIT = "1gb"
"""Of each file: a LoRA of a large base has some hundred MB. Photos have their own limit."""


@dataclass(frozen=True)
class Serving:
    """Where the app listens.

    Attributes:
        host: address; the loopback one unless ``--listen`` was given.
        port: TCP port.
        users: names and hashed passwords; None: nobody is asked.
        share: also open Gradio's public tunnel.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    users: dict[str, str] | None = None
    share: bool = False


def serve(folder: DataFolder, serving: Serving) -> None:
    """Serve the app until Ctrl-C or SIGTERM, then end in order: what trains is saved.

    Raises:
        UserError: when the port or the data folder is in use, or no tunnel can be opened.
    """
    with _lock(folder):
        _check_port(serving)
        _empty(folder)
        # Read by Gradio, and by Matplotlib, which Gradio loads where it is installed.
        os.environ["GRADIO_TEMP_DIR"] = str(folder.part("uploads"))
        os.environ.setdefault("MPLCONFIGDIR", str(folder.part("cache") / "matplotlib"))
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        studio = Studio.open(folder)
        app = _launch(studio, serving)
        try:
            studio.start()
            print(f"NoRA Diffusion is at http://{serving.host}:{serving.port}", flush=True)
            print(f"Data: {folder.root}", flush=True)
            if serving.share:
                print(f"Shared at {_open_tunnel(serving, app.share_token)}", flush=True)
            while not stop.wait(1.0):  # without a limit Windows would hold Ctrl-C back
                pass
            print("Ending: what trains is saved ...", flush=True)
        finally:
            # A second Ctrl-C ends at once.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            app.close(verbose=False)
            studio.close()


def _import_gradio() -> None:
    """Import Gradio without the stubs for editors, which it writes beside itself at every import.

    They cost about half of that time. Gradio leaves them out for a class that has no file.
    """
    original = inspect.getfile

    def getfile(of: Any) -> str:
        if inspect.isclass(of) and of.__module__.startswith("gradio."):
            raise OSError("no stubs")
        return original(of)

    inspect.getfile = getfile
    try:
        importlib.import_module("gradio")
    finally:
        inspect.getfile = original


def _launch(studio: Studio, serving: Serving) -> gr.Blocks:
    _import_gradio()
    from webui.app import build_app
    from webui.theme import CSS, THEME

    app = build_app(studio)
    app.queue(default_concurrency_limit=8, max_size=200)
    # Gradio looks for work every millisecond, which alone takes a tenth of a core; on Windows it
    # takes this interval itself.
    app._queue.sleep_when_free = 0.05

    def user_of(cookies: dict[str, str]) -> str | None:
        id = app.app.cookie_id
        token = cookies.get(f"access-token-{id}") or cookies.get(f"access-token-unsecure-{id}")
        return app.app.tokens.get(token)

    folder = studio.folder
    gate = Middleware(
        Gate, uploads=folder.part("uploads"), user_of=user_of if serving.users else None
    )
    app.launch(
        server_name=serving.host,
        server_port=serving.port,
        # Gradio awaits one that is a coroutine function, though its type does not say so.
        auth=cast(Any, Logins(serving.users).check) if serving.users else None,
        # Whence Gradio may copy what is shown; the gate serves nothing but those copies.
        allowed_paths=[str(folder.part(name)) for name in PARTS if name != "uploads"],
        app_kwargs={"middleware": [gate]},
        max_file_size=UPLOAD_LIMIT,
        prevent_thread_lock=True,
        quiet=True,
        theme=THEME,
        css=CSS,
        footer_links=[],
        enable_monitoring=False,
        run_history=False,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )
    return app


def _lock(folder: DataFolder) -> FileLock:
    lock = FileLock(folder.root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"--data-dir {folder.root}: another nora webui uses it; "
            "end that one, or give another folder"
        ) from None
    return lock


def _check_port(serving: Serving) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except OSError as error:
            raise UserError(
                f"--port {serving.port}: cannot be used ({error.strerror}); give another one"
            ) from None


def _empty(folder: DataFolder) -> None:
    # Copies that a server which was killed has left; one that ends removes its own.
    uploads = folder.part("uploads")
    shutil.rmtree(uploads, ignore_errors=True)
    uploads.mkdir(exist_ok=True)


def _open_tunnel(serving: Serving, token: str) -> str:
    # Not launch(share=True): its page takes its scripts from elsewhere.
    from gradio import networking

    try:
        return networking.setup_tunnel(serving.host, serving.port, token, None, None)
    except Exception as error:  # of several libraries, none of which says which
        raise UserError(f"--share: no tunnel could be opened ({error})") from None
