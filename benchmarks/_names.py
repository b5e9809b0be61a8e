"""Names of countries, languages, currencies, scripts and places, and their translations.

They are those of Debian's iso-codes, which the package `pycountry` carries with all translations
(`pip install "nora-diffusion[tasks]"`).
"""

import gettext
import hashlib
import importlib.util
import json
from pathlib import Path

# Domain of the translations -> kind, database, fields with names.
SOURCES = {
    "iso3166-1": ("country", "3166-1", ("name", "common_name", "official_name")),
    "iso639-3": ("language", "639-3", ("name",)),
    "iso639-5": ("language", "639-5", ("name",)),
    "iso4217": ("currency", "4217", ("name",)),
    "iso15924": ("script", "15924", ("name",)),
    "iso3166-2": ("place", "3166-2", ("name",)),
}


def is_installed() -> bool:
    return importlib.util.find_spec("pycountry") is not None


def names(domain: str) -> list[str]:
    """All English names of a domain, sorted."""
    _, number, fields = SOURCES[domain]
    file = _folder() / "databases" / f"iso{number}.json"
    rows = json.loads(file.read_text(encoding="utf-8"))[number]
    return sorted({row[field] for row in rows for field in fields if field in row})


def translations(language: str, longest: int) -> dict[str, str]:
    """English name -> name in a language, where the two differ and neither is too long."""
    found: dict[str, str] = {}
    for domain in SOURCES:
        known = gettext.translation(domain, _folder() / "locales", [language])
        for name in names(domain):
            other = known.gettext(name)
            if other != name and max(len(name.encode()), len(other.encode())) <= longest:
                found.setdefault(name, other)
    return found


def split_of(name: str) -> str:
    """Whether a name is for "train", "validation" or "test", in every language and task."""
    tenth = hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 10
    return {0: "test", 1: "validation"}.get(tenth, "train")


def _folder() -> Path:
    spec = importlib.util.find_spec("pycountry")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
