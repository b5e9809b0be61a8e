"""`nora targets`: what would be trained, from configs alone."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForTokenClassification, MambaConfig

from nora_diffusion.adapter import NoraConfig
from nora_diffusion.cli import USER_ERROR, main
from nora_diffusion.families import ASSETS
from nora_diffusion.targets import LORA_RANK

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture
def bert(tmp_path):
    """A transformers folder that holds a config and no weights."""
    config = BertConfig(**SMALL, architectures=["BertForTokenClassification"])
    config.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def shown(capsys, *argv: str) -> str:
    assert main(["targets", *argv]) == 0
    return capsys.readouterr().out


def trained(config) -> int:
    model = get_peft_model(BertForTokenClassification(BertConfig(**SMALL)), config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets", ["attention", "all-linear", r".*\.query"])
def test_the_counts_are_those_of_the_adapted_model(bert, capsys, targets):
    (head, *_) = shown(capsys, str(bert), "--targets", targets, "--r", "8").splitlines()
    nora, lora = re.search(r"trains ([\d,]+), LoRA r 16 ([\d,]+)", head).groups()
    config = NoraConfig(r=8, inner_r=8, target_modules=targets)
    assert int(nora.replace(",", "")) == trained(config)
    names = list(config.target_modules) if targets == "attention" else targets
    assert int(lora.replace(",", "")) == trained(LoraConfig(r=LORA_RANK, target_modules=names))


def test_modules_are_shown_by_kind_with_their_shapes(bert, capsys):
    attention, *rest = shown(capsys, str(bert / "config.json")).split("\nall-linear")
    assert [line.split() for line in attention.splitlines()[1:]] == [
        ["2", "self.query", "32", "x", "32"],
        ["2", "self.key", "32", "x", "32"],
        ["2", "self.value", "32", "x", "32"],
        ["2", "output.dense", "32", "x", "32"],
    ]
    # The class that the config names: a bare BertModel has no classifier.
    assert re.search(r"1 +classifier +2 x 32", rest[0])


def test_names_are_those_of_the_command_line(bert, capsys):
    out = shown(capsys, str(bert), "--targets", "query", "attention.output.dense", "--modules")
    assert "bert.encoder.layer.1.attention.output.dense" in out
    assert "query, attention.output.dense: 4 modules" in out


def test_a_shipped_config_shows_its_base_without_weights(capsys):
    out = shown(capsys, "flux")
    single = (
        r"transformer, feed_forward: .*38  single_transformer_blocks\.N\.proj_out  3072 x 15360"
    )
    assert re.search(single, out, re.DOTALL)
    assert out.startswith("transformer, attention: 266 modules, NoRA r 64 inner r 8 trains 272,384")


def test_the_weights_of_a_model_are_never_read(bert, capsys):
    (bert / "model.safetensors").write_bytes(b"these are no weights")
    assert "attention: 8 modules" in shown(capsys, str(bert))


@pytest.mark.parametrize("extra", [[], ["--targets", "attention"]])
def test_a_model_without_attention(tmp_path, capsys, extra):
    MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    if not extra:
        assert "attention: no modules" in shown(capsys, str(tmp_path))
        return
    assert main(["targets", str(tmp_path), *extra]) == USER_ERROR
    err = capsys.readouterr().err
    assert "--targets: " in err and "layers.N.mixer.in_proj (1)" in err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nothing-known"}, "transformers cannot read its config"),
        ({}, "transformers cannot read its config"),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path, capsys, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["targets", str(tmp_path)]) == USER_ERROR
    err = capsys.readouterr().err
    assert message in err and ".gguf" in err


def test_a_target_that_nora_cannot_adapt_is_named(bert, capsys):
    assert main(["targets", str(bert), "--targets", "word_embeddings"]) == USER_ERROR
    assert "word_embeddings' is a Embedding" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["targets", "plan"])
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--targets", "("], '--targets "(": is no regular expression (missing ), unterminated'),
        (["--r", "7", "--inner-r", "9"], "--inner-r 9: must be at most --r 7"),
        (["--r", "7"], "--inner-r 8: must be at most --r 7"),
    ],
)
def test_what_cannot_be_a_target_or_a_rank_is_named(bert, capsys, command, argv, message):
    assert main([command, str(bert), *argv]) == USER_ERROR
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["targets", "plan"])
def test_a_run_folder_is_told_from_a_model(tmp_path, capsys, command):
    (tmp_path / "config.toml").write_text('[model]\nbase = "mini"\n')
    assert main([command, str(tmp_path)]) == USER_ERROR
    assert f'"{tmp_path}": is the folder of a run; give its base, mini' in capsys.readouterr().err


def test_modules_that_cannot_have_the_rank_are_told(bert, capsys):
    assert "attention: 8 modules, NoRA r 32" in shown(capsys, str(bert), "--r", "32")
    out = shown(capsys, str(bert), "--r", "40")
    assert "attention: 8 modules (8 of them narrower than r, e.g. bert.enc" in out
    assert main(["plan", str(bert), "--r", "40", "--lora-xs-r", "4"]) == 0
    told = capsys.readouterr().out
    assert "8 of 8 modules are narrower than r 40 of NoRA" in told and "of LoRA" not in told


def test_looking_leaves_a_model_as_it_was():
    from nora_diffusion.targets import Choice, find_targets

    with torch.device("meta"):
        model = BertForTokenClassification(BertConfig(**SMALL))
    before = [(name, type(module)) for name, module in model.named_modules()]
    assert len(find_targets(Choice("attention", model, "attention"), 8, 2)) == 8
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("config", "base"),
    [("llm", "smollm2_135m"), ("clip_fewshot", "mini_clip"), ("mini_clip", ASSETS / "mini_clip")],
)
def test_configs_of_other_commands_show_their_bases(capsys, config, base):
    told = shown(capsys, config, "--targets", "attention")
    assert told == shown(capsys, str(base), "--targets", "attention")
    assert re.match(r"attention: \d+ modules", told)
    assert main(["plan", config, "--r", "8"]) == 0
    assert "trained parameters" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["targets", "plan"])
@pytest.mark.parametrize("given", [["nothing"], ["nothing", "at_all"], [r".*\.nothing"]])
def test_where_nothing_matches_the_linear_layers_are_listed(bert, capsys, command, given):
    assert main([command, str(bert), "--targets", *given]) == USER_ERROR
    err = capsys.readouterr().err
    assert f"--targets: {', '.join(given)}: no such module in this BertForTokenCl" in err
    assert "attention.self.query (2)" in err and "classifier (1)" in err


@pytest.mark.parametrize("command", ["targets", "plan"])
def test_a_name_that_matches_nothing_beside_others_is_told(bert, command):
    names = ["query", "qery", "self.key", "lf.value"]  # an ending begins after a dot
    with pytest.warns(UserWarning, match=r"^--targets qery lf\.value: no module") as told:
        assert main([command, str(bert), "--targets", *names]) == 0
    assert len([found for found in told if "--targets" in str(found.message)]) == 1


@pytest.mark.filterwarnings("error:--targets")
def test_names_that_all_match_need_no_warning(bert, capsys):
    assert "3 modules" in shown(capsys, str(bert), "--targets", "query", "classifier")
    shown(capsys, "sd15")  # a family's own endings are those of several models


def test_the_packaged_language_model_goes_by_its_name_in_configs(capsys):
    assert main(["targets", "smollm2", "--targets", "attention"]) == 0
    named = capsys.readouterr().out
    assert main(["targets", "smollm2_135m", "--targets", "attention"]) == 0
    assert "122,880" in named and named == capsys.readouterr().out
