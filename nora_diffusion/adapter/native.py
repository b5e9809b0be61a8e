"""The native adapter file: what it holds, and every check that needs no model.

Tensors are called `<component>.<module>.<part>`; the header is one JSON text. A compact file has
the inner pair alone, a portable one the outer pair beside it. Fields: `docs/formats.md`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from . import header
from .config import NoraConfig
from .factors import Factors
from .header import CHECKSUM_KEY, AdapterFileError

FORMAT_VERSION = 1
VERSION_KEY = "nora.format_version"
HEADER_KEY = "nora.header"

_INNER = ("nora_inner_A", "nora_inner_B")
_OUTER = ("nora_outer_A", "nora_outer_B", "nora_singular_values")
_NAME = re.compile(
    rf"(?P<component>[a-z0-9_]+)\.(?:(?P<module>.+)\.(?P<part>{'|'.join((*_INNER, *_OUTER))})"
    r"|(?P<owner>.+)\.nora_saved\.(?P<parameter>.+))"
)
_CONFIG_FIELDS = {f.name for f in dataclasses.fields(NoraConfig)} - {
    f.name for f in dataclasses.fields(PeftConfig)
}


@dataclass(frozen=True)
class ModulePair:
    """Trained tensors of one module.

    Attributes:
        inner_A: ``Q (k, r)``, or ``Q - Q0`` if the component is stored as a difference.
        inner_B: ``P (r, k)``, or ``P - P0``.
        outer: the outer pair of a portable file.
    """

    inner_A: Tensor
    inner_B: Tensor
    outer: Factors | None = None


@dataclass(frozen=True)
class Component:
    """The adapter of one model.

    Attributes:
        config: its configuration.
        modules: trained tensors by module name.
        fingerprints: digest of the base weight that each module was trained on.
        base_dtype: dtype of these base weights, e.g. "bfloat16".
        difference: the inner pair is stored less its initial value, so that a cast to 16 bits
            rounds what was learnt and not the (much larger) initial product of `init="sigma"`.
        saved: fully trained modules (`modules_to_save`), parameters by module name.
    """

    config: NoraConfig
    modules: dict[str, ModulePair]
    fingerprints: dict[str, str]
    base_dtype: str
    difference: bool = False
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])


@dataclass(frozen=True)
class NativeAdapter:
    """Contents of a native file.

    Attributes:
        components: adapters by component name ("unet", "text_encoder", "model", ...).
        portable: the outer pairs are in the file.
        about: what the file says of its origin (base, family, trigger, steps, ...).
        checksum: digest of the whole content.
    """

    components: dict[str, Component]
    portable: bool
    about: dict[str, Any]
    checksum: str = ""


def write_native(path: Path, adapter: NativeAdapter) -> None:
    """Write a native file atomically."""
    header.write(path, *encode(adapter))


def encode(adapter: NativeAdapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a native file."""
    tensors: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    for name, component in adapter.components.items():
        for module, pair in component.modules.items():
            tensors |= _module_tensors(f"{name}.{module}", pair)
        for owner, parameters in component.saved.items():
            for parameter, value in parameters.items():
                tensors[f"{name}.{owner}.nora_saved.{parameter}"] = value
        table[name] = {
            "config": config_to_json(component.config),
            "base_dtype": component.base_dtype,
            "difference": component.difference,
            "fingerprints": component.fingerprints,
        }
    fields = {**adapter.about, "kind": "native", "portable": adapter.portable, "components": table}
    return tensors, header_metadata(fields)


def header_metadata(fields: Mapping[str, Any]) -> dict[str, str]:
    """Metadata entries that hold a header."""
    text = json.dumps(fields, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return {VERSION_KEY: str(FORMAT_VERSION), HEADER_KEY: text}


def parse_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Header of a file of this project, None for another program's file.

    Raises:
        AdapterFileError: a newer format, or a header that is not one.
    """
    version = metadata.get(VERSION_KEY)
    if version is None and not any(key.startswith("nora.") for key in metadata):
        return None
    if version is not None and version.isascii() and version.isdigit():
        if int(version) > FORMAT_VERSION:
            raise AdapterFileError(
                f"{path}: written in format {version}, this version of nora-diffusion reads up to "
                f"{FORMAT_VERSION}. Upgrade it: pip install -U nora-diffusion"
            )
    if version != str(FORMAT_VERSION) or HEADER_KEY not in metadata or CHECKSUM_KEY not in metadata:
        raise header.damaged(path, "its header is incomplete")
    try:
        fields = json.loads(metadata[HEADER_KEY])
    except (ValueError, RecursionError) as error:
        raise header.damaged(path, f"its header is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise header.damaged(path, "its header is not a table")
    known = cast("dict[str, Any]", fields)
    table = known.get("components")
    if known.get("kind") not in ("native", "lora") or not isinstance(table, dict) or not table:
        raise header.damaged(path, "its header lists no components")
    if not all(isinstance(entry, dict) for entry in cast("dict[str, Any]", table).values()):
        raise header.damaged(path, "a component in its header is not a table")
    return known


def parse_native(path: Path, contents: header.Contents, fields: dict[str, Any]) -> NativeAdapter:
    """Contents of a native file, checked as far as possible without the base model.

    Raises:
        AdapterFileError: missing or foreign tensors, wrong shapes, NaN, an unusable configuration.
    """
    portable = fields.get("portable")
    if not isinstance(portable, bool):
        raise header.damaged(path, "its header does not say whether it is portable")
    groups = _group_tensors(path, contents.tensors, portable)
    entries = cast("dict[str, dict[str, Any]]", fields["components"])
    if foreign := sorted(set(groups) - set(entries)):
        raise header.damaged(path, f"tensors of {foreign[0]!r}, which its header does not list")
    about = {k: v for k, v in fields.items() if k not in ("kind", "portable", "components")}
    components = {
        name: _parse_component(path, name, entry, groups.get(name, _Group()), portable)
        for name, entry in entries.items()
    }
    return NativeAdapter(components, portable, about, contents.metadata[CHECKSUM_KEY])


def config_to_json(config: NoraConfig) -> dict[str, Any]:
    """All fields of a configuration as JSON values; later versions may have other defaults."""
    found: dict[str, Any] = {}
    for name in sorted(_CONFIG_FIELDS):
        value = getattr(config, name)
        found[name] = sorted(cast("set[str]", value)) if isinstance(value, set) else value
    return found


def config_from_json(path: Path, fields: Any) -> NoraConfig:
    """Configuration from its JSON form.

    Raises:
        AdapterFileError: unknown fields or values that are not allowed.
    """
    if not isinstance(fields, dict):
        raise header.damaged(path, "a component has no configuration")
    known = cast("dict[str, Any]", fields)
    if unknown := sorted(set(known) - _CONFIG_FIELDS):
        raise AdapterFileError(
            f"{path}: its configuration has the unknown field {unknown[0]!r}; upgrade "
            "nora-diffusion to the version that wrote it"
        )
    try:
        return NoraConfig(**known)
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f"{path}: its configuration is not usable: {error}") from error


@dataclass
class _Group:
    """Tensors of one component: parts by module, parameters by fully trained module."""

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])


def _module_tensors(prefix: str, pair: ModulePair) -> dict[str, Tensor]:
    tensors = {f"{prefix}.nora_inner_A": pair.inner_A, f"{prefix}.nora_inner_B": pair.inner_B}
    if pair.outer is not None:
        tensors[f"{prefix}.nora_outer_A"] = pair.outer.outer_A
        tensors[f"{prefix}.nora_outer_B"] = pair.outer.outer_B
        tensors[f"{prefix}.nora_singular_values"] = pair.outer.singular_values
    return tensors


def _group_tensors(path: Path, tensors: dict[str, Tensor], portable: bool) -> dict[str, _Group]:
    groups: dict[str, _Group] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or (match["part"] in _OUTER and not portable):
            raise AdapterFileError(
                f"{path}: holds the foreign tensor {name!r}. Only tensors written by save_adapter "
                "are allowed; export or save the adapter again"
            )
        # Half precision has no isfinite reduction that is faster; a file has few such tensors.
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(
                f"{path}: {name!r} holds NaN, infinite or integer values, so the training went "
                "wrong. Use an earlier checkpoint, or train again with a lower learning rate"
            )
        group = groups.setdefault(match["component"], _Group())
        if match["part"] is None:
            group.saved.setdefault(match["owner"], {})[match["parameter"]] = tensor
        else:
            group.parts.setdefault(match["module"], {})[match["part"]] = tensor
    return groups


def _parse_component(
    path: Path, name: str, fields: dict[str, Any], group: _Group, portable: bool
) -> Component:
    fingerprints = fields.get("fingerprints")
    if not isinstance(fingerprints, dict):
        raise header.damaged(path, f"component {name!r} has no fingerprints")
    recorded = {str(k): str(v) for k, v in cast("dict[Any, Any]", fingerprints).items()}
    if difference := sorted(set(recorded) ^ set(group.parts)):
        raise AdapterFileError(
            f"{path}: the modules named in the header and those with tensors differ, e.g. "
            f"{name}.{difference[0]}. Copy, download or save the file again"
        )
    config = config_from_json(path, fields.get("config"))
    modules = {
        module: _parse_module(path, f"{name}.{module}", parts, config, recorded[module], portable)
        for module, parts in group.parts.items()
    }
    return Component(
        config=config,
        modules=modules,
        fingerprints=recorded,
        base_dtype=str(fields.get("base_dtype")),
        difference=bool(fields.get("difference")),
        saved=group.saved,
    )


def _parse_module(
    path: Path,
    name: str,
    parts: dict[str, Tensor],
    config: NoraConfig,
    fingerprint: str,
    portable: bool,
) -> ModulePair:
    for part in (*_INNER, *(_OUTER if portable else ())):
        if part not in parts:
            raise AdapterFileError(
                f"{path}: {name}.{part} is missing. Copy, download or save the file again"
            )
    inner_A, inner_B = parts["nora_inner_A"], parts["nora_inner_B"]
    module = name.partition(".")[2]
    largest = _from_pattern(config.rank_pattern, module, config.r)
    largest_inner = _from_pattern(config.inner_rank_pattern, module, config.inner_r)
    k, r = inner_A.shape if inner_A.ndim == 2 else (0, 0)
    fits = inner_B.shape == (r, k) and 1 <= k <= min(r, largest_inner) and r <= largest
    outer = None
    if portable:
        outer_A, outer_B, values = (parts[part] for part in _OUTER)
        fits &= outer_A.ndim == 2 and outer_A.shape[0] == r
        fits &= outer_B.ndim == 2 and outer_B.shape[1] == r and values.shape == (r,)
        outer = Factors(outer_B.float(), outer_A.float(), values.float(), fingerprint)
    if not fits:
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in parts.items())
        raise AdapterFileError(
            f"{path}: {name} has tensors of the wrong shape ({shapes}) for r={largest}, "
            f"inner_r={largest_inner}. Save the adapter again"
        )
    return ModulePair(inner_A, inner_B, outer)


def _from_pattern(pattern: dict[str, int], module: str, default: int) -> int:
    return pattern.get(get_pattern_key(list(pattern), module), default)
