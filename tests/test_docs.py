"""The documents name files, symbols and tests that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import timm

from config import load_config
from quantization import PRESETS, QuantLinear, resolve
from quantization.rotation import Rotation

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


def test_a_method_of_one_s_own_in_python_is_what_readme_says():
    section = (ROOT / "README.md").read_text().split("### Your own method")[1].split("\n## ")[0]
    names = {"my_vit": timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=3, num_heads=2, img_size=32)}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1), names)
    layers = [m for m in names["my_vit"].modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 8 and all(layer.recipe.q5.scale_format == "e8m3" for layer in layers)
    assert all(layer.recipe.rotate_grad_weight == Rotation(16, "fresh") for layer in layers)


def test_a_method_of_one_s_own_in_a_file_is_what_readme_says(tmp_path):
    section = (ROOT / "README.md").read_text().split("### Your own method")[1].split("\n## ")[0]
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    commands = [line for line in section.splitlines() if line.startswith(("cp ", "sed "))]
    assert len(commands) == 2
    for command in commands:
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    mine = tmp_path / "configs/methods/mine.yaml"
    mine.write_text(mine.read_text().replace("scale_format: e4m3", "scale_format: ue5m3"))
    recipe = resolve(load_config(tmp_path / "configs/methods/deit_tiny_mine.yaml").quant)
    assert recipe.q1.scale_format == "ue5m3" and recipe.policy == PRESETS["nvfp4"].policy


def test_readme_has_the_figures_of_the_results_page() -> None:
    """Table 2 of both models, every interval, and how many runs of each study there are."""
    readme = " ".join((ROOT / "README.md").read_text().split("## Results so far")[1].split())
    page = (ROOT / "docs/RESULTS.md").read_text()
    names = {"full_precision": "full precision", "microscaling": "Microscaling", "tetrajet": "TetraJet"}
    names |= {
        "int4": "INT4 per tensor",
        "tetrajet_qema": "TetraJet + Q-EMA",
        "tetrajet_qramping": "TetraJet + Q-Ramping",
    }
    shown: dict[str, list[str]] = {row: [] for row in names}
    for model in ("DeiT", "Swin"):
        for line in page.split(f"### Table 2, {model}")[1].split("###")[0].splitlines():
            row, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if row in names:
                _, _, mean, _, difference, _, _, published = cells
                shown[row] += ["" if cell == "-" else cell for cell in (mean, difference.rstrip(" *"), published)]
    for row, cells in shown.items():
        assert len(cells) == 6 and " ".join(f"| {names[row]} | {' | '.join(cells)} |".split()) in readme, row
    intervals = re.findall(r"[+-]\d+\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]", readme)
    assert len(intervals) > 10 and not [one for one in intervals if one not in page]
    counts = re.findall(r"Runs that are done: (\d+); the study has (\d+)", page)
    for done, planned in counts:
        assert re.search(rf"\b{done} of (their|its) {planned}\b", readme), (done, planned)
    assert len(counts) == 3


def test_readme_has_the_verdicts_of_the_results_page() -> None:
    """How many findings of the paper's tables show, do not, are within noise, and how many of those have its sign."""
    readme = " ".join((ROOT / "README.md").read_text().split("## Results so far")[1].split())
    page = (ROOT / "docs/RESULTS.md").read_text()
    verdicts = page.split("## The stabilizers")[0].split("| finding |")[1].split("![")[0]
    words = dict(zip(range(6), ("None", "One", "Two", "Three", "Four", "Five"), strict=True))
    counts = Counter(re.findall(r"\| \*\*([a-z ]+?)(?: so far)?\*\* \|", verdicts))
    assert f"{words[counts['shows']]} show: " in readme and f"{words[counts['does not']]} does not: " in readme
    of_its_sign = len(re.findall(r"\*\*within noise\*\* \| \+\d+\.\d+ \[\d", verdicts))
    within_noise = (
        f"other {counts['within noise']} are within noise, {words[of_its_sign].lower()} of them with an interval"
    )
    assert within_noise in readme and f"adjusted for all {counts.total()}." in readme
    assert f"Our {words[counts['undecided']].lower()} checks" in readme
