"""Names and passwords: the file, the command that writes it, and what guessing costs."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastapi import HTTPException

from nora_diffusion.config import UserError
from webui.__main__ import main
from webui.auth import (
    Limits,
    Logins,
    add_user,
    client_address,
    hash_password,
    read_auth_file,
    verify_password,
)

ROOT = Path(__file__).parent.parent.parent
PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
def hashed() -> str:
    return hash_password(PASSWORD)


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def check(logins: Logins, *tries: tuple[str, str]) -> list[bool]:
    async def run() -> list[bool]:
        return [await logins.check(name, password) for name, password in tries]

    return asyncio.run(run())


def test_a_hash_fits_its_password_alone_and_has_a_salt(hashed):
    assert hashed.startswith("scrypt$") and PASSWORD not in hashed
    assert verify_password(PASSWORD, hashed)
    assert not verify_password(f"{PASSWORD} ", hashed)
    assert hash_password(PASSWORD) != hashed


def test_the_file_is_written_for_its_owner_alone_and_read_back(tmp_path):
    path = tmp_path / "users"
    assert add_user(path, "ann", lambda _: PASSWORD)
    assert path.stat().st_mode & 0o777 == 0o600
    before = read_auth_file(path)["ann"]
    assert add_user(path, "bob", lambda _: PASSWORD)
    assert not add_user(path, "ann", lambda _: f"{PASSWORD} 2")
    users = read_auth_file(path)
    assert list(users) == ["ann", "bob"] and users["ann"] != before
    assert verify_password(f"{PASSWORD} 2", users["ann"])
    assert [file.name for file in tmp_path.iterdir()] == ["users"]


@pytest.mark.parametrize(
    ("name", "answers", "told"),
    [
        ("a:b", [], "use 1 to 64 of the letters"),
        ("", [], "use 1 to 64 of the letters"),
        ("ann\nbob", [], "use 1 to 64 of the letters"),
        ("ann", ["short"], "a password of 5 letters; give 10 to 1000"),
        ("ann", [PASSWORD, PASSWORD.upper()], "the two passwords differ; nothing was changed"),
    ],
)
def test_a_name_or_password_that_cannot_be_used_is_told_and_nothing_written(
    tmp_path, name, answers, told
):
    typed = iter(answers)
    with pytest.raises(UserError, match=told):
        add_user(tmp_path / "users", name, lambda _: next(typed))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_file_that_others_may_open_is_refused(tmp_path, hashed, mode):
    path = write(tmp_path / "users", f"ann:{hashed}\n", mode)
    with pytest.raises(UserError, match=f"mode {mode:03o}.*chmod 600"):
        read_auth_file(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names nobody"),
        ("ann:password\n", "line 1 is not name:scrypt"),
        ("ann:{h}\n\nann:{h}\n", "line 3 names somebody again"),
        ("an n:{h}\n", "line 1 is not"),
        ("ann:{h}:{h}\n", "line 1 is not"),
        # A hash that would take gigabytes or hours to check.
        ("ann:scrypt$1073741824$8$1$AAAAAAAAAAAAAAAAAAAAAA==$" + "A" * 43 + "=\n", "line 1 is not"),
    ],
)
def test_a_line_that_is_not_as_it_should_be_is_told(tmp_path, hashed, text, told):
    path = write(tmp_path / "users", text.replace("{h}", hashed))
    with pytest.raises(UserError, match=told):
        read_auth_file(path)


def test_the_right_password_of_the_right_name_comes_in(hashed):
    logins = Logins({"ann": hashed})
    assert check(
        logins, ("ann", PASSWORD), ("ann", ""), ("bob", PASSWORD), ("", ""), ("ann", "x" * 10**6)
    ) == [True, False, False, False, False]


def test_a_name_that_nobody_has_takes_as_long(hashed):
    logins = Logins({"ann": hashed}, Limits(free=100))

    async def fastest(name: str) -> float:
        took = []
        for _ in range(2):
            begun = time.process_time()
            await logins.check(name, "a wrong password")
            took.append(time.process_time() - begun)
        return min(took)

    known, unknown = asyncio.run(fastest("ann")), asyncio.run(fastest("nobody"))
    assert 0.5 < unknown / known < 2


def test_wrong_passwords_make_the_next_try_wait_but_never_long(hashed):
    limits = Limits(longest_name_wait_s=4.0)
    logins = Logins({"ann": hashed, "bob": hashed}, limits)
    waits = []
    for _ in range(12):
        waits.append(logins.wait_s("ann"))
        logins.note_wrong("ann")
    assert waits == [0, 0, 0, 0.25, 0.5, 1, 2, 4, 4, 4, 4, 4]
    assert logins.wait_s("bob") == 0


def test_wrong_passwords_for_many_names_make_every_try_wait(hashed):
    logins = Logins({"ann": hashed})
    for number in range(10_000):
        logins.note_wrong(f"name-{number}")
    assert logins.wait_s("ann") == Limits().longest_wait_s


def test_what_is_long_ago_is_forgotten(hashed):
    logins = Logins({"ann": hashed}, Limits(window_s=0.0))
    for _ in range(10):
        logins.note_wrong("ann")
    time.sleep(0.01)
    assert logins.wait_s("ann") == 0


def test_one_address_cannot_hold_the_others_up(hashed):
    async def run() -> tuple[list[object], bool]:
        logins = Logins({"ann": hashed}, Limits(waiting_per_address=2))

        async def attempt(address: str, password: str) -> bool:
            client_address.set(address)
            return await logins.check("ann", password)

        attacks = [asyncio.create_task(attempt("192.0.2.1", "wrong")) for _ in range(50)]
        own = asyncio.create_task(attempt("192.0.2.2", PASSWORD))
        return await asyncio.gather(*attacks, return_exceptions=True), await own

    attacks, own = asyncio.run(run())
    refused = [one for one in attacks if isinstance(one, HTTPException)]
    assert own is True
    assert len(refused) == 48 and {one.status_code for one in refused} == {429}


# --- the command


def run(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "webui", *arguments],
        cwd=ROOT,
        input=typed,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_adds_somebody_from_standard_input(tmp_path):
    path = tmp_path / "users"
    done = run("--add-user", "ann", "--auth-file", str(path), typed=f"{PASSWORD}\n{PASSWORD}\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}: ann added\n", "")
    assert verify_password(PASSWORD, read_auth_file(path)["ann"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--listen"], "--listen: the app would be open to the network to anybody; give"),
        (["--share"], "--share: the app would be open to the internet to anybody; give"),
        (["--add-user", "ann"], "--add-user: --auth-file FILE is missing"),
        (["--auth-file", "{tmp}/none"], "cannot be read (No such file or directory); make it"),
        (["--data-dir", "{tmp}/file/x"], "--data-dir {tmp}/file/x: cannot be used"),
    ],
)
def test_what_cannot_be_started_is_one_sentence(tmp_path, capsys, arguments, told):
    (tmp_path / "file").write_bytes(b"")
    code = main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("nora webui: error: ") and err.count("\n") == 1
    assert told.replace("{tmp}", str(tmp_path)) in err


def test_a_port_in_use_is_one_sentence(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = main(["--port", str(port), "--data-dir", str(tmp_path / "data")])
    told = capsys.readouterr().err
    assert code == 2 and told.count("\n") == 1
    assert told.startswith(f"nora webui: error: --port {port}: cannot be used (Address already in")


def test_a_missing_extra_is_one_sentence_with_the_command_to_run(tmp_path):
    # As in an environment without the extra: the import of one of its packages fails.
    (tmp_path / "gradio.py").write_text('raise ModuleNotFoundError("no", name="gradio")')
    done = subprocess.run(
        [sys.executable, "-m", "webui", "--data-dir", str(tmp_path / "data")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "nora webui: error: gradio is not installed; run: pip install 'nora-diffusion[webui]'\n"
    )
