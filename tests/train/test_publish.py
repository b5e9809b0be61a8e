"""Uploading a finished run, to a hub that listens on this machine and to one that does not."""

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nora_diffusion.config import UserError
from nora_diffusion.events import read_events
from nora_diffusion.settings import to_toml
from nora_diffusion.train import dreambooth

ROOT = Path(__file__).parents[2]
UNREACHABLE = "http://127.0.0.1:9"
RUN = """
import sys
from nora_diffusion.cli import main_dreambooth
sys.exit(main_dreambooth())
"""
PUSH = """
import sys
from pathlib import Path
from nora_diffusion.train.publish import push_to_hub
print(push_to_hub(Path(sys.argv[1]), sys.argv[2]))
"""


class Hub(ThreadingHTTPServer):
    """The three answers an upload needs; ``files`` holds what came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({"id": "anna/my-toy", "siblings": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.address}/anna/my-toy", "id": "anna/my-toy"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name, **modes} for name in names]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[entry["value"]["path"]] = content
            url = f"{self.server.address}/anna/my-toy/commit/0"
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})
        else:  # such as validating YAML
            self.answer({"errors": [], "warnings": []})

    def answer(self, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def environment(endpoint: str) -> dict[str, str]:
    """Of a process that takes ``endpoint`` for the hub."""
    kept = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    token = {"HF_TOKEN": "hf_" + "a" * 34, "HF_HUB_OFFLINE": "0"}
    return {**kept, **token, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}


def test_a_failed_upload_loses_nothing_and_says_how_to_try_again(make_config, tmp_path, hub):
    output = {"dir": str(tmp_path / "my run"), "push_to_hub": "anna/my-toy"}
    cfg = make_config(
        data={"class_name": "toy", "cache": False},
        train={"steps": 1, "batch_size": 1},
        output=output,
    )
    (tmp_path / "my.toml").write_text(to_toml(cfg))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "my.toml")],
        cwd=ROOT, env=environment(UNREACHABLE), capture_output=True, text=True,
    )  # fmt: skip
    run = tmp_path / "my run"
    assert done.returncode == 2, done.stderr
    assert 'output.push_to_hub = "anna/my-toy": the run is finished' in done.stderr
    assert "Traceback" not in done.stderr
    assert {"adapter.safetensors", "README.md", "before_after.png", "samples", "checkpoints"} <= {
        path.name for path in run.iterdir()
    }
    last = read_events(run / "events.jsonl")[-1]
    assert last["event"] == "error" and "try again with: hf upload" in str(last["message"])

    # The command it names does upload the run ...
    told = re.search(r"try again with: (hf upload .*)", done.stderr)
    assert told
    _, *words = shlex.split(told[1])
    program = "import sys; from huggingface_hub.cli.hf import main; sys.exit(main())"
    again = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=environment(hub.address), capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    by_command = dict(hub.files)
    assert by_command["adapter.safetensors"] == (run / "adapter.safetensors").read_bytes()
    assert {"README.md", "config.toml", "before_after.png", "samples/sheet.png"} <= set(by_command)
    assert not [name for name in by_command if name.startswith(("checkpoints", "tensorboard", "."))]

    # ... and so does what a run ends with, when it can reach its hub.
    hub.files.clear()
    hub.created.clear()
    pushed = subprocess.run(
        [sys.executable, "-c", PUSH, str(run), "anna/my-toy"],
        cwd=ROOT, env=environment(hub.address), capture_output=True, text=True,
    )  # fmt: skip
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == f"{hub.address}/anna/my-toy"
    assert hub.files == by_command
    (request,) = hub.created
    assert request.get("private") is True or request.get("visibility") == "private"


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("my-toy", "hf_x", 'output.push_to_hub = "my-toy": give USER/NAME'),
        ("anna/my toy", "hf_x", "give USER/NAME"),
        ("anna/my/toy", "hf_x", "give USER/NAME"),
        ("anna/my-toy", "", "no Hugging Face token.*hf auth login"),
    ],
)
def test_an_upload_that_could_not_work_is_told_before_training(
    repo, token, message, make_config, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    cfg = make_config(output={"dir": str(tmp_path / "run"), "push_to_hub": repo})
    with pytest.raises(UserError, match=message):
        dreambooth.run(cfg)
    assert not (tmp_path / "run").exists()
