"""Who may log in: a file of names and hashed passwords, and a limit on guesses."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import re
import secrets
import stat
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from fastapi import HTTPException

from nora_diffusion.config import UserError

USER_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
PASSWORD_LETTERS = (10, 1000)

client_address: ContextVar[str] = ContextVar("client_address", default="")
"""Where the request at hand comes from; set by ``gate.Gate``."""

# 32 MiB and three passes: as hard as OWASP's 128 MiB and one, at a memory that two logins at a
# time leave to the rest of the process.
_N, _R, _P = 2**15, 8, 3


def hash_password(password: str) -> str:
    """``scrypt$n$r$p$salt$hash``, with a new salt."""
    salt = secrets.token_bytes(16)
    encoded = (base64.b64encode(part).decode() for part in (salt, _scrypt(password, salt)))
    return "$".join(["scrypt", str(_N), str(_R), str(_P), *encoded])


def verify_password(password: str, hashed: str) -> bool:
    """Whether the password has that hash; the time does not tell how much of it is right."""
    _, n, r, p, salt, wanted = hashed.split("$")
    found = _scrypt(password, base64.b64decode(salt), int(n), int(r), int(p))
    return hmac.compare_digest(found, base64.b64decode(wanted))


def _scrypt(password: str, salt: bytes, n: int = _N, r: int = _R, p: int = _P) -> bytes:
    memory = 128 * r * (n + p + 2)
    return hashlib.scrypt(
        password.encode(errors="surrogatepass"), salt=salt, n=n, r=r, p=p, maxmem=memory, dklen=32
    )


_LINE = re.compile(
    r"(?P<name>[A-Za-z0-9._@-]{1,64}):"
    r"(?P<hash>scrypt\$(?:1024|2048|4096|8192|16384|32768|65536|131072)\$8\$[1-9]"
    r"\$[A-Za-z0-9+/]{22,}={0,2}\$[A-Za-z0-9+/]{43}=)"
)


def read_auth_file(path: Path) -> dict[str, str]:
    """Names and hashes of an auth file.

    Raises:
        UserError: when it cannot be read, others may read it, or a line is not as it should be.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(
            f"--auth-file {path}: cannot be read ({reason}); "
            "make it with: nora webui --add-user NAME --auth-file FILE"
        ) from None
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(
            f"--auth-file {path}: others may open it (mode {stat.S_IMODE(mode):03o}); "
            f"run: chmod 600 {path}"
        )
    users: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None or found["name"] in users:
            problem = "names somebody again" if found else "is not name:scrypt$n$r$p$salt$hash"
            raise UserError(
                f"--auth-file {path}: line {number} {problem}; make lines with --add-user NAME"
            )
        users[found["name"]] = found["hash"]
    if not users:
        raise UserError(f"--auth-file {path}: names nobody; add somebody with --add-user NAME")
    return users


def add_user(path: Path, name: str, ask: Callable[[str], str]) -> bool:
    """Add somebody to an auth file, or give them a new password; the file is made if missing.

    Args:
        path: the auth file.
        name: letters, digits and ``._@-``.
        ask: called with a question, twice; returns what was typed.

    Returns:
        Whether the name is new.

    Raises:
        UserError: when the name or password cannot be used, or the two passwords differ.
    """
    if not USER_NAME.fullmatch(name):
        raise UserError(
            f"--add-user {name!r}: use 1 to 64 of the letters A-Z and a-z, digits and . _ @ -"
        )
    users = read_auth_file(path) if path.exists() else {}
    password = ask(f"Password for {name}: ")
    least, most = PASSWORD_LETTERS
    if not least <= len(password) <= most:
        raise UserError(
            f"--add-user {name}: a password of {len(password)} letters; "
            f"give {least} to {most}, such as four words"
        )
    if ask("The same again: ") != password:
        raise UserError(f"--add-user {name}: the two passwords differ; nothing was changed")
    is_new = name not in users
    users[name] = hash_password(password)
    _write_private(path, "".join(f"{name}:{hashed}\n" for name, hashed in users.items()))
    return is_new


def _write_private(path: Path, text: str) -> None:
    # mkstemp makes files that only their owner may open.
    try:
        handle, temporary = tempfile.mkstemp(dir=path.resolve().parent, prefix=".auth-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path.resolve())
    except OSError as error:
        raise UserError(f"--auth-file {path}: cannot be written ({error.strerror})") from None


@dataclass(frozen=True)
class Limits:
    """How guesses are slowed down.

    Attributes:
        window_s: for how long a wrong password counts.
        free: wrong passwords for one name that cost nothing.
        longest_name_wait_s: the most that wrong passwords for a name can cost the next try.
        free_overall: wrong passwords for all names together that cost nothing.
        longest_wait_s: the most that those can cost.
        waiting_per_address: tries from one address that may wait at a time; more are refused.
    """

    window_s: float = 600.0
    free: int = 3
    longest_name_wait_s: float = 4.0
    free_overall: int = 30
    longest_wait_s: float = 2.0
    waiting_per_address: int = 4


class Logins:
    """Checks names and passwords, and makes every guess cost time.

    The wait before a try grows with the wrong passwords for its name, and with those for all names,
    to a few seconds: a name that somebody else guesses at stays usable. Whoever wants to guess
    faster needs many addresses, since only a few tries of each may wait at once.
    """

    def __init__(self, users: dict[str, str], limits: Limits | None = None) -> None:
        self._users = users
        self._limits = limits or Limits()
        # Compared with when nobody has that name, so that it takes as long.
        self._nobody = hash_password(secrets.token_urlsafe())
        self._wrong: deque[tuple[float, str]] = deque()
        self._wrong_of: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._checking = asyncio.Semaphore(2)

    async def check(self, name: str, password: str) -> bool:
        """Whether they may come in.

        Raises:
            HTTPException: 429 when too many tries of the same address are waiting.
        """
        address = client_address.get()
        if self._waiting[address] >= self._limits.waiting_per_address:
            raise HTTPException(429, "Too many logins at once; wait some seconds and try again.")
        self._waiting[address] += 1
        try:
            await asyncio.sleep(self.wait_s(name))
            async with self._checking:
                return await self._fits(name, password)
        finally:
            self._waiting[address] -= 1
            if not self._waiting[address]:
                del self._waiting[address]

    def wait_s(self, name: str) -> float:
        """Seconds that the next try for this name has to wait."""
        self._forget()
        limits = self._limits
        of_name = self._wrong_of[_short(name)] - limits.free
        overall = len(self._wrong) - limits.free_overall
        return max(
            min(0.25 * 2.0 ** min(of_name, 10), limits.longest_name_wait_s) if of_name >= 0 else 0,
            min(0.02 * overall, limits.longest_wait_s),
            0,
        )

    def note_wrong(self, name: str) -> None:
        """Count a wrong password for this name."""
        self._wrong.append((time.monotonic(), _short(name)))
        self._wrong_of[_short(name)] += 1

    async def _fits(self, name: str, password: str) -> bool:
        hashed = self._users.get(name)
        fits = await asyncio.to_thread(
            verify_password, password[: PASSWORD_LETTERS[1] + 1], hashed or self._nobody
        )
        if fits and hashed is not None:
            return True
        self.note_wrong(name)
        return False

    def _forget(self) -> None:
        oldest = time.monotonic() - self._limits.window_s
        # More than 10,000 in the window change no wait.
        while self._wrong and (self._wrong[0][0] < oldest or len(self._wrong) > 10_000):
            _, name = self._wrong.popleft()
            self._wrong_of[name] -= 1
            if not self._wrong_of[name]:
                del self._wrong_of[name]


def _short(name: str) -> str:
    return name[:65]
