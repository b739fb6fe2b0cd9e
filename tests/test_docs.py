"""The documents name files, symbols and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Folders whose files a document may name without the folder; the last are those of README's layout.
FOLDERS = ("", "docs", "scripts", "configs/ablations", "config", "images", "models", "record", "results", "studies")
FOLDERS += ("training", "quantization/backends", "quantization/backends/gpu", "quantization/layers")
FOLDERS += ("quantization/operands", "quantization/watch")


@pytest.mark.parametrize("document", ["docs/PAPER_MAP.md", "README.md", "CONTRIBUTING.md"])
def test_every_path_and_symbol_named_in_a_document_exists(document):
    named = re.findall(r"`([\w./-]+\.(?:py|sh|yaml|md|txt))(?:::(\w+))?`", (ROOT / document).read_text())
    assert named
    for path, symbol in named:
        found = [p for p in (ROOT / folder / path for folder in FOLDERS) if p.is_file()]
        if not found and path == "resolved.yaml":  # of a run, not of the repository
            continue
        assert found, f"{document} names {path}, which does not exist"
        if symbol:
            assert re.search(rf"^(def|class) {symbol}\b|^{symbol}\b", found[0].read_text(), re.MULTILINE), (
                f"{document} names {symbol}, which is not in {path}"
            )
