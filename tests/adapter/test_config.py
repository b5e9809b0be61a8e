"""`NoraConfig`, its place in PEFT, and what importing the package does."""

import copy
import pickle
import subprocess
import sys

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from nora_diffusion.adapter import NORA, NoraConfig, NoraModel, peft_type
from nora_diffusion.adapter.config import timestep_law

FIELDS = (
    "r inner_r scaling dropout init basis seed timestep_rank rank_pattern inner_rank_pattern "
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save bias "
    "init_weights"
).split()


def test_fields_and_defaults():
    own = [name for name in NoraConfig.__dataclass_fields__ if name in FIELDS]
    assert sorted(own) == sorted(FIELDS)
    inherited = set(PeftConfig.__dataclass_fields__)
    assert set(NoraConfig.__dataclass_fields__) - inherited == set(FIELDS)
    config = NoraConfig()
    defaults = (config.r, config.inner_r, config.scaling, config.dropout, config.init, config.basis)
    assert defaults == (64, 8, 1.0, 0.0, "orthogonal", "weight")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "`r` must be an integer of at least 1, got 0"),
        ({"r": 4.0}, "`r` must be an integer"),
        ({"inner_r": True}, "`inner_r` must be an integer of at least 1, got True"),
        ({"rank_pattern": {"to_q": -1}}, r"`rank_pattern\['to_q'\]` must be .* got -1"),
        ({"inner_rank_pattern": {"to_q": "8"}}, r"`inner_rank_pattern\['to_q'\]` .* got '8'"),
        ({"init": "zeros"}, "`init` must be one of orthogonal, sigma, gradient, got 'zeros'"),
        ({"basis": "svd"}, "`basis` must be one of weight, .*, random, got 'svd'"),
        ({"bias": "lora_only"}, "`bias` must be one of none, all, nora_only, got 'lora_only'"),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1, got 1.0"),
        ({"scaling": float("nan")}, "`scaling` must be a finite number, got nan"),
        ({"seed": 1.5}, "`seed` must be an integer, got 1.5"),
        ({"timestep_rank": -1.0}, "`timestep_rank` must be None"),
        ({"timestep_rank": {"k_min": 1}}, "`timestep_rank` must be None"),
        ({"timestep_rank": {"alpha": 1.0, "kmin": 1}}, "`timestep_rank` must be None"),
        ({"timestep_rank": {"alpha": 1.0, "k_min": 9}}, "k_min=9, which is above inner_r=8"),
        ({"target_modules": "x.*", "layers_to_transform": [1]}, "cannot be used when"),
        ({"target_modules": ["x"], "layers_pattern": "h"}, "must also be specified"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_given_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        NoraConfig(**fields)


def test_timestep_law_forms():
    assert timestep_law(NoraConfig()) is None
    assert timestep_law(NoraConfig(timestep_rank=2)) == (2.0, 1)
    assert timestep_law(NoraConfig(timestep_rank={"alpha": 0.5, "k_min": 3})) == (0.5, 3)


def test_a_config_survives_saving(tmp_path):
    config = NoraConfig(
        r=16,
        inner_r=4,
        init="sigma",
        basis="random",
        seed=3,
        target_modules=["to_q", "to_k"],
        rank_pattern={"to_q": 8},
        timestep_rank={"alpha": 1.5, "k_min": 2},
        layers_to_transform=[0, 2],
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, NoraConfig)
    mine, theirs = ({name: getattr(which, name) for name in FIELDS} for which in (config, loaded))
    assert mine == theirs


def test_nora_is_a_member_of_the_enum_like_any_other():
    assert PeftType("NORA") is PeftType.NORA is NORA
    assert NORA.value == NORA.name == "NORA" == str.__str__(NORA)
    assert NORA in list(PeftType) and "NORA" in PeftType.__members__
    assert copy.deepcopy(NORA) is NORA and pickle.loads(pickle.dumps(NORA)) is NORA
    assert PEFT_TYPE_TO_TUNER_MAPPING[NORA] is NoraModel


def test_adding_the_type_twice_is_harmless_but_another_nora_is_refused(monkeypatch):
    assert peft_type.add_peft_type() is NORA
    # Without our mark the member is that of some later PEFT.
    monkeypatch.delattr(NORA, "_added_by_nora_diffusion")
    with pytest.raises(RuntimeError, match=r"own method called NORA.*constraints\.txt"):
        peft_type.add_peft_type()


def test_importing_the_package_is_light_and_its_names_register_the_method():
    code = """
import sys, nora_diffusion
nora_diffusion.__version__, dir(nora_diffusion)
heavy = {"torch", "peft", "diffusers", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
from nora_diffusion import NoraConfig
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.NORA] is NoraConfig
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_wrong_public_name_is_an_attribute_error():
    import nora_diffusion

    with pytest.raises(AttributeError, match="no attribute 'load_adaptor'"):
        _ = nora_diffusion.load_adaptor
    assert set(nora_diffusion.__all__) <= set(dir(nora_diffusion))
