"""NoRA as a PEFT method; knows nothing of diffusion. Importing this registers ``NORA`` with PEFT.

Afterwards `peft.get_peft_model`, `PeftModel.from_pretrained`, diffusers' and transformers'
``add_adapter`` take a `NoraConfig` like any other PEFT configuration.
"""

# PEFT's and torch's own annotations are partial.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import register_peft_method

from .ahead import joint_cores, kept_updates
from .config import NoraConfig
from .factors import Factors, cached_factors, factorise, factorise_many, fingerprint
from .layer import Conv2d, Linear, NoraLayer
from .model import NoraModel, deferred_factors, derive_factors, iter_nora_layers
from .peft_type import NORA
from .start import fit_start
from .statistics import fit_basis
from .targets import attention_projections

__all__ = [
    "NORA",
    "Conv2d",
    "Factors",
    "Linear",
    "NoraConfig",
    "NoraLayer",
    "NoraModel",
    "attention_projections",
    "cached_factors",
    "deferred_factors",
    "derive_factors",
    "factorise",
    "factorise_many",
    "fingerprint",
    "fit_basis",
    "fit_start",
    "iter_nora_layers",
    "joint_cores",
    "kept_updates",
]

if NORA not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="nora", config_cls=NoraConfig, model_cls=NoraModel)
