"""The one place that extends PEFT: its closed enum of methods learns the name ``NORA``."""

from typing import Any, cast

from peft.utils.peft_types import PeftType

_MARK = "_added_by_nora_diffusion"


def add_peft_type() -> PeftType:
    """Add ``PeftType.NORA`` if it is not there, and return it.

    PEFT refuses to register a method whose name is no member of the enum, and parts of transformers
    read ``.value`` of it, so that a plain string does not do.

    Raises:
        RuntimeError: This version of PEFT has a method of its own called NORA.
    """
    existing = cast("dict[str, Any]", PeftType.__members__).get("NORA")
    if existing is not None:
        if not hasattr(existing, _MARK):
            raise RuntimeError(
                "the installed PEFT has its own method called NORA, which is not the one of this "
                "package; install a PEFT version that constraints.txt names"
            )
        return existing
    # EnumMeta offers no way to add a member after the class body; these are the tables it fills.
    enum = cast(Any, PeftType)
    member = cast(Any, str.__new__(PeftType, "NORA"))
    member._name_ = "NORA"
    member._value_ = "NORA"
    member._sort_order_ = len(enum._member_names_)
    member.__objclass__ = PeftType
    setattr(member, _MARK, True)
    enum._member_names_.append("NORA")
    enum._member_map_["NORA"] = member
    enum._value2member_map_["NORA"] = member
    # EnumMeta.__setattr__ refuses members; from Python 3.12 on they are read as plain attributes.
    type.__setattr__(PeftType, "NORA", member)
    return member


NORA = add_peft_type()
