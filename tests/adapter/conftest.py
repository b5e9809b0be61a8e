"""Adapter tests share nothing on disk, least of all with the user's own cache."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Give every test an empty factor cache; returns its folder."""
    folder = tmp_path / "nora-cache"
    monkeypatch.setenv("NORA_CACHE_DIR", str(folder))
    return folder
