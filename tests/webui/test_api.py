"""The endpoints through the real server, and what their page says of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from tests.webui.server import ROOT, Server, free_port

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SAMPLES = ROOT / "sample_data" / "subject"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("api") / "data") as started:
        yield started


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    return Client(server.url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


@pytest.fixture(scope="module")
def refusal(client) -> str:
    """What the first upload is told, before anybody has said that they may use the photos."""
    with pytest.raises(AppError) as raised:
        client.predict(**upload(), api_name="/upload")
    assert client.predict(api_name="/subjects") == []
    return str(raised.value)


@pytest.fixture(scope="module")
def subject(client, refusal) -> str:
    return client.predict(**upload(), rights=True, api_name="/upload")["subject"]


def upload() -> dict[str, object]:
    """Arguments of /upload that are as they should be."""
    files = [handle_file(path) for path in sorted(SAMPLES.glob("*.jpg"))[:2]]
    return {"name": "Mug", "files": files, "class_name": "mug", "trigger": "sks"}


def endpoints_of(client: Client) -> dict[str, list[tuple[str, object]]]:
    """Endpoint to its parameters; the default of each, or ``...`` where it must be given."""
    found = client.view_api(return_format="dict", print_info=False)
    assert isinstance(found, dict)
    return {
        name: [
            (
                one["parameter_name"],
                one["parameter_default"] if one["parameter_has_default"] else ...,
            )
            for one in endpoint["parameters"]
        ]
        for name, endpoint in found["named_endpoints"].items()
    }


def endpoints_of_page() -> dict[str, list[tuple[str, object]]]:
    found = {}
    for name, arguments in re.findall(r"^### `(/\w+)\((.*)\)`$", PAGE, re.MULTILINE):
        parts = [part.partition("=") for part in arguments.split(", ") if part]
        spelt = {"False": "false", "None": "null"}
        found[name] = [
            (key, json.loads(spelt.get(value, value)) if equals else ...)
            for key, equals, value in parts
        ]
    return found


def test_page_and_server_name_the_same_endpoints_with_the_same_parameters(client):
    assert endpoints_of_page() == endpoints_of(client)


def test_every_endpoint_says_what_it_does_and_what_it_answers_with(server):
    listing = httpx.get(f"{server.url}/gradio_api/info").json()
    assert listing["unnamed_endpoints"] == {}
    for name, endpoint in listing["named_endpoints"].items():
        assert len(endpoint["description"]) > 10, name
        (answer,) = endpoint["returns"]
        assert answer["type"], name


def test_the_pages_fields_are_those_of_the_answers(client, subject):
    listing = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    for name in ("subjects", "status", "adapters"):
        told = PAGE.partition(f"### `/{name}(")[2].partition("{")[2].partition("}")[0]
        schema = listing[f"/{name}"]["returns"][0]["type"]
        assert re.findall(r'"(\w+)"', told) == list(schema.get("items", schema)["properties"]), name


@pytest.mark.slow
def test_the_pages_script_uploads_trains_waits_samples_and_downloads(server, tmp_path):
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "learn.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "learn.py", server.url, str(SAMPLES), "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{server.output}"
    *_, drawn, lora = done.stdout.splitlines()
    assert drawn.endswith("a sks flower on the beach"), drawn
    pictures = [Path(word) for word in drawn.split() if word.endswith(".png")]
    assert len(pictures) == 2
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    content = (tmp_path / lora).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert any(key.startswith("unet.") and key.endswith("lora_A.weight") for key in header)


def test_the_server_holds_neither_torch_nor_much_memory(server, subject):
    process = psutil.Process(server.process.pid)
    mapped = Path(f"/proc/{process.pid}/maps")
    if mapped.is_file():
        assert not re.search(r"/(torch|libtorch\w*)[/.]", mapped.read_text())
    assert process.memory_info().rss < 350e6


NO_ID = "0123456789abcdef"
WRONG = {
    "/upload name": ("/upload", {"name": 5}, "name: Input should be a valid string; given was 5"),
    "/upload no photo": ("/upload", {"files": []}, "files: List should have at least 1 item"),
    "/upload no file": ("/upload", {"files": [7]}, "files: 1 is not a file"),
    "/upload rights": ("/upload", {"rights": "yes"}, "rights: Input should be a valid boolean"),
    "/upload empty": ("/upload", {"name": " "}, "name: missing; give one with at least one letter"),
    "/train subject": ("/train", {"subject": NO_ID}, "there is no such subject"),
    "/train overrides": ("/train", {"overrides": ["a"]}, "overrides: Input should be a valid dict"),
    "/train key": ("/train", {"overrides": {"train.step": 3}}, "train.step"),
    "/train value": ("/train", {"overrides": {"train.steps": -3}}, "train.steps"),
    "/train base": ("/train", {"base": "nothing"}, "base = "),
    "/train preset": ("/train", {"preset": "9gb"}, "9gb"),
    "/status": ("/status", {"job": NO_ID}, "there is no such run"),
    "/stop": ("/stop", {"job": NO_ID}, "there is no such run"),
    "/resume": ("/resume", {"job": None}, "job: Input should be a valid string"),
    "/download": ("/download", {"adapter": "Rex"}, "there is no adapter called Rex"),
    "/download layout": ("/download", {"layout": "onnx"}, "layout: Input should be 'native', "),
    "/sample n": ("/sample", {"n": 17}, "n: Input should be less than or equal to 16; given"),
    "/sample part": ("/sample", {"n": 1.5}, "n: Input should be a valid integer"),
    "/sample seed": ("/sample", {"seed": -1}, "seed: Input should be greater than or equal to 0"),
    "/sample steps": ("/sample", {"steps": True}, "steps: Input should be a valid integer"),
    "/sample guidance": ("/sample", {"guidance": 51}, "guidance: Input should be less than or"),
    "/sample prompt": (
        "/sample",
        {"prompt": "a" * 4001},
        "prompt: String should have at most 4000",
    ),
    "/sample base": ("/sample", {"base": "/tmp"}, "base: '/tmp' is none of mini, "),
    "/sample five": ("/sample", {"adapters": [{"name": "a"}] * 5}, "adapters: List should have at"),
    "/sample key": ("/sample", {"adapters": [{"id": "a"}]}, "adapters.0.name: Field required"),
    "/sample weight": (
        "/sample",
        {"adapters": [{"name": "a", "weight": 9}]},
        "adapters.0.weight: Input should be less than or equal to 2; given was 9",
    ),
    "/sample name": ("/sample", {"adapters": [{"name": "a"}]}, "there is no adapter called a"),
}


@pytest.mark.parametrize(("endpoint", "arguments", "told"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named(client, subject, endpoint, arguments, told):
    right = {
        "/upload": upload(),
        "/train": {"subject": subject},
        "/sample": {"prompt": "a mug"},
        "/download": {"adapter": NO_ID},
    }.get(endpoint, {})
    with pytest.raises(AppError) as raised:
        client.predict(**{**right, **arguments}, api_name=endpoint)
    assert told in str(raised.value)


def test_whoever_has_not_said_that_they_may_use_their_photos_uploads_none(refusal, client):
    assert refusal.startswith("rights: give true once, if you have the right to use these photos")


def test_nothing_but_this_machine_is_answered_without_logins(server):
    """A page elsewhere may give its own name the address 127.0.0.1, or send what a form can."""
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "", "["):
        assert httpx.get(f"{server.url}/config", headers={"Host": host}).status_code == 421, host
    for host in ("localhost", f"localhost:{server.port}", "[::1]", "127.0.0.1"):
        assert httpx.get(f"{server.url}/config", headers={"Host": host}).status_code == 200, host


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost"]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/config"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/call/v2/subjects"),
        ("OPTIONS", "/gradio_api/queue/join"),
    ],
)
def test_requests_of_other_sites_are_refused(server, origin, method, path):
    answer = httpx.request(
        method,
        f"{server.url}{path}",
        headers={"Origin": origin, "Content-Type": "text/plain"},
        content=b"{}" if method == "POST" else None,
    )
    assert answer.status_code == 403
    own = httpx.get(f"{server.url}/config", headers={"Origin": server.url})
    assert own.status_code == 200


def test_a_second_server_on_the_same_data_is_refused(server):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "webui",
            "--port",
            str(free_port()),
            "--data-dir",
            str(server.data_dir),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"nora webui: error: --data-dir .*: another nora webui .*\n", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_ending_saves_what_trains(tmp_path, how):
    with Server(tmp_path / "data") as server:
        client = Client(server.url, verbose=False)
        files = [handle_file(path) for path in sorted(SAMPLES.glob("*.jpg"))]
        subject = client.predict("Mug", files, "mug", "sks", True, api_name="/upload")["subject"]
        settings = {"train.steps": 5000, "train.batch_size": 1, "train.log_every": 1}
        job = client.predict(subject, "mini", settings, api_name="/train")
        limit = time.monotonic() + 240
        while client.predict(job, api_name="/status")["step"] < 2:
            assert time.monotonic() < limit, server.output
            time.sleep(0.5)
        assert server.stop(getattr(signal, how), timeout_s=120) == 0
        assert "Traceback" not in server.output
    with Server(tmp_path / "data") as server:
        client = Client(server.url, verbose=False)
        now = client.predict(job, api_name="/status")
        assert now["state"] in ("stopped", "interrupted") and now["step"] >= 2, now
        assert "goes on from step" in now["message"], now


@pytest.mark.slow
def test_it_starts_within_five_seconds(tmp_path):
    """Counted in seconds of this process alone, so that others on the machine do not matter."""
    with Server(tmp_path / "data") as server:
        times = psutil.Process(server.process.pid).cpu_times()
        assert times.user + times.system < 5, server.started_s
