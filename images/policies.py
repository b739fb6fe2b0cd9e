"""The names that timm gives to policies of AutoAugment, read as strictly as they are meant.

timm leaves out what it does not understand, so that `rand-m9-mstd` or `rand-strong` train with another policy than
the one that was asked for, and a data set that needs no transform never asks timm at all.
"""

from __future__ import annotations

import re

from config import Config, UserError

_WHOLE, _REAL, _SWITCH = r"\d{1,3}", r"\d{1,3}(\.\d+)?", "[01]"
# What may follow each kind of policy: the name of a section and the form of its value.
_SECTIONS = {
    "rand": {
        **{"m": _WHOLE, "n": "[1-9][0-9]?", "p": r"0?\.\d*[1-9]\d*|1(\.0*)?", "mstd": _REAL, "mmax": _WHOLE},
        **{"inc": _SWITCH, "t": "weights|3aw|3a"},
    },
    "augmix": {"m": _WHOLE, "w": "[1-9][0-9]?", "d": "[1-9][0-9]?", "a": _REAL, "b": _SWITCH, "mstd": _REAL},
    **{kind: {"mstd": _REAL} for kind in ("original", "originalr", "v0", "v0r", "3a")},
}


def check_policy(cfg: Config) -> None:
    """Raises UserError where `aug.aa` is no policy of timm's."""
    policy = cfg.aug.aa
    if policy is None or cfg.aug.three_augment:
        return
    kind, *sections = policy.split("-")
    if kind not in _SECTIONS:
        reason = f"a policy is one of {', '.join(_SECTIONS)}, with sections after it"
    else:
        forms = _SECTIONS[kind]
        unknown = [s for s in sections if not any(re.fullmatch(f"{name}({form})", s) for name, form in forms.items())]
        names = [re.match("[a-z]*", section)[0] for section in sections]
        if unknown:
            reason = f"it has no section {unknown[0]!r}; those of {kind} are {', '.join(forms)}, with a value each"
        elif len(set(names)) < len(names):
            reason = "a section is given twice"
        else:
            return
    raise UserError(f"aug.aa {policy} is not one of timm's, such as rand-m9-mstd0.5-inc1: {reason}.")
