"""Shared by all tests: caches of their own, so that a test never reads what a user's run left."""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="nora-tests-")
os.environ["NORA_CACHE_DIR"] = _CACHE.name  # inherited by the processes that tests start
