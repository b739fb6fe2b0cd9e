"""What a key of the configuration is made of: number types, a field with its flags, paths, a section."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticKnownError


def _number(error_type: Literal["int_type", "float_type"]) -> BeforeValidator:
    """Refuses true and false, which pydantic takes for 1 and 0; its strict mode would refuse 3e-4, to YAML a text."""

    def refuse_switches(value: Any) -> Any:
        if isinstance(value, bool):
            raise PydanticKnownError(error_type)
        return value

    return BeforeValidator(refuse_switches)


Int = Annotated[int, _number("int_type")]
Float = Annotated[float, _number("float_type")]
Deviation = Annotated[Float, Field(ge=1e-6, le=1e6)]  # of pixels from 0 to 1, so that float32 divides by it
Mean = Annotated[Float, Field(ge=-1e6, le=1e6)]
Share = Annotated[Float, Field(ge=0, le=1)]


def key(default: Any, help: str, *flags: str, consts: dict[str, Any] | None = None, **constraints: Any) -> Any:
    """A key: default, help text, DeiT's name(s) of its flag, flags that set it to a constant, pydantic's ranges."""
    return Field(
        default, description=help, json_schema_extra={"flags": list(flags), "consts": consts or {}}, **constraints
    )


# Behind the type of a mapping whose entries the user names: null takes one out that another file has.
Entries = AfterValidator(lambda mapping: {name: entry for name, entry in mapping.items() if entry is not None})


def path_on_disk(value: str | None, info: ValidationInfo) -> str | None:
    """Refuses what can be no path on this machine."""
    if value is None:
        return None
    if not value.strip():
        raise ValueError("a path was expected, not an empty text")
    if "\0" in value:
        raise ValueError("a path cannot have a NUL character in it")
    # Sets of timm may be elsewhere, and the file of a teacher that is not wanted is not looked at.
    elsewhere = "/" in info.data.get("set", "") or info.data.get("type") == "none"
    if re.match(r"[A-Za-z][\w+.-]*://", value) and not elsewhere:
        raise ValueError(f"{value[:100]} is a URL and a path was expected; download it and give the path of the copy")
    return value


def ascending(value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value is not None and (value[0] > value[1] or not value[1]):
        raise ValueError(f"a range was expected, the smaller share first; got {list(value)}")
    return value


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )
