"""Opening the database, and bringing an older one up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import Session, sessionmaker

from nora_diffusion.config import UserError

Sessions = sessionmaker[Session]


def open_database(path: Path) -> Sessions:
    """Make or migrate the SQLite file, and return what opens sessions on it.

    Raises:
        UserError: when a newer version of the app has written it.
    """
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
    event.listen(engine, "connect", _prepare_connection)
    _migrate(engine, path)
    return sessionmaker(engine, expire_on_commit=False)


def _prepare_connection(connection: Any, _: Any) -> None:
    # Readers are not held up by a writer; what is committed survives a crash of the process.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")
    # What is deleted, such as the captions of somebody's photos, is overwritten with zeros.
    connection.execute("PRAGMA secure_delete=ON")


def _migrate(engine: Engine, path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise UserError(
                f"{path}: was written by a newer version of the app ({error}); update "
                "nora-diffusion, or give another --data-dir"
            ) from None
