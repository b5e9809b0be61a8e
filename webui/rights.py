"""Who has said that they may use the photos they upload: asked once, before anything is kept."""

from __future__ import annotations

import threading
import time

from sqlalchemy import select

from nora_diffusion.config import UserError
from webui.database import Sessions
from webui.models import Choice

_KEY = "may use the uploaded photos"
_MISSING = "nothing was kept: confirm once that you have the right to use these photos, then go on"


class Rights:
    """What each owner has confirmed."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self._writing = threading.Lock()  # looked up and written in one go

    def confirmed(self, owner: str) -> bool:
        """Whether this owner has said that they may use the photos they upload."""
        with self.sessions() as session:
            return session.scalar(_choice_of(owner)) is not None

    def confirm(self, owner: str) -> None:
        """Keep that they have said so."""
        with self._writing, self.sessions.begin() as session:
            if session.scalar(_choice_of(owner)) is None:
                session.add(Choice(owner=owner, key=_KEY, value=str(time.time())))

    def require(self, owner: str) -> None:
        """Go on only for those who have.

        Raises:
            UserError: when this owner has not.
        """
        if not self.confirmed(owner):
            raise UserError(_MISSING)


def _choice_of(owner: str):
    return select(Choice.id).where(Choice.owner == owner, Choice.key == _KEY)
