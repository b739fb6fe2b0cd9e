"""What the schema is made of: sections, keys, and numbers that are no switches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
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
Positive = Annotated[Float, Field(gt=0)]
Share = Annotated[Float, Field(ge=0, le=1)]


def key(default: Any, help: str, *flags: str, consts: dict[str, Any] | None = None, **constraints: Any) -> Any:
    """A key: default, help text, DeiT's name(s) of its flag, flags that set it to a constant, pydantic's ranges."""
    return Field(
        default, description=help, json_schema_extra={"flags": list(flags), "consts": consts or {}}, **constraints
    )


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )
