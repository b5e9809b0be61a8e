"""Everything the tabs and the API work with, made once for each server."""

from __future__ import annotations

from dataclasses import dataclass

from webui.bin import DailyRound
from webui.database import open_database
from webui.dispatcher import is_working
from webui.forecast import Forecasts
from webui.jobs import Jobs
from webui.library import Library
from webui.paths import DataFolder
from webui.pictures import Pictures
from webui.sampler import Sampler
from webui.subjects import Subjects


@dataclass(frozen=True)
class Studio:
    """The services over one data folder; they know nothing of pages."""

    folder: DataFolder
    subjects: Subjects
    jobs: Jobs
    sampler: Sampler
    library: Library
    pictures: Pictures
    forecasts: Forecasts
    rounds: DailyRound

    @classmethod
    def open(cls, folder: DataFolder) -> Studio:
        """Open the database and everything on it; nothing runs until ``start``."""
        sessions = open_database(folder.database)
        sampler = Sampler(folder, lambda: is_working(sessions))
        library = Library(folder, sessions)
        subjects = Subjects(folder, sessions)
        return cls(
            folder=folder,
            subjects=subjects,
            jobs=Jobs(folder, sessions, before_start=sampler.release, on_done=library.adopt),
            sampler=sampler,
            library=library,
            pictures=Pictures(folder, sessions),
            forecasts=Forecasts(folder, sessions),
            rounds=DailyRound(subjects.expire, library.expire),
        )

    def start(self) -> None:
        """Remove what a crash left half done, empty the bin, and begin to work on the queue."""
        self.subjects.tidy()
        self.library.tidy()
        self.pictures.tidy()
        self.rounds.start()
        self.jobs.start()

    def close(self) -> None:
        """Stop what runs, saving it."""
        self.rounds.close()
        self.forecasts.close()
        self.jobs.close()
        self.sampler.close()
