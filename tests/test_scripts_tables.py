"""The scripts of the tables: the runs they start, one or all of them, and what they refuse."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from script_helpers import ROOT, SCRIPTS, STUB, TORCHRUN, bash, clean_env, executable

from config import dump_config, load_config
from config.rows import all_cells
from record.runlog import RunLog

CELLS = all_cells()


class Tables:
    """table<N>.sh with a Python that answers study.py and records the runs: [configuration, folder, other words]."""

    def __init__(self, folder: Path) -> None:
        self.runs_dir = folder / "my runs"
        self.record = folder / "record"
        stub = STUB.replace('> "$RECORD"', '>> "$RECORD"; echo END >> "$RECORD"; ${THEN:-true}')
        self.python = executable(folder / "my bin" / "python", stub)
        self.result: subprocess.CompletedProcess

    def environment(self, **env: str) -> dict[str, str]:
        ours = {"PYTHON": self.python, "RECORD": self.record, "RUNS_DIR": self.runs_dir, "REAL_PYTHON": sys.executable}
        return clean_env(**{**ours, "NPROC": "1", **env})

    def __call__(self, number: int, *words: str, **env: str) -> list[list[str]]:
        self.record.unlink(missing_ok=True)
        self.result = bash(SCRIPTS / f"table{number}.sh", *words, env=self.environment(**env), cwd=self.runs_dir.parent)
        return self.started()

    def started(self) -> list[list[str]]:
        text = self.record.read_text() if self.record.exists() else ""
        runs = []
        for words in (part.split("\n")[:-1] for part in text.split("END\n")[:-1]):
            at = words.index("--config")
            assert words[at - 1 : at + 1] == [str(ROOT / "main.py"), "--config"] and words[at + 2] == "--output_dir"
            runs.append(
                [words[at + 1].removeprefix(f"{ROOT}/configs/"), words[at + 3], *words[: at - 1], *words[at + 4 :]]
            )
        return runs

    def run(self, name: str, config: str) -> list[str]:
        return [config, str(self.runs_dir / name), "--resume", "auto"]

    def make(self, name: str, reference: str, *overrides: str, epochs: int = 90) -> None:
        """A run directory with `epochs` evaluated epochs."""
        with RunLog(self.runs_dir / name) as log:
            log.write_config(dump_config(load_config(ROOT / "configs" / reference, overrides)))
            for epoch in range(epochs):
                log.log((epoch,), {"top1": 50.0}, tag="eval")


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    return Tables(tmp_path)


@pytest.mark.parametrize("number", range(1, 11))
def test_a_table_script_runs_a_row_of_its_table(tables: Tables, number: int) -> None:
    cell = [cell for cell in CELLS if cell.table == number][-1]
    config = cell.run_reference.removeprefix(f"{ROOT}/configs/")
    assert tables(number, cell.row, cell.column, "--lr", "1") == [[*tables.run(cell.run, config), "--lr", "1"]]
    assert tables.result.returncode == 0
    assert os.access(SCRIPTS / f"table{number}.sh", os.X_OK)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]], ids=str)
def test_a_table_script_lists_its_rows(tables: Tables, words: list[str]) -> None:
    assert tables(1, *words) == []
    lines = tables.result.stdout.splitlines()
    assert lines[0].startswith("Table 1: top-1 accuracy (%) with one quantizer active")
    assert "q1              deit_tiny   61.50  bash scripts/table1.sh q1 deit_tiny" in lines
    assert any(line.endswith("table1.sh full_precision deit_tiny   # the same run as deit_tiny_fp") for line in lines)
    assert len([line for line in lines if "bash scripts/table1.sh" in line]) == 16 + 2
    assert (tables.result.returncode, tables.result.stderr) == (0, "")


def test_a_row_on_several_gpus_and_nodes(tables: Tables) -> None:
    config, run = "ablations/table1.yaml#q1/deit_tiny", str(tables.runs_dir / "table1_q1_deit_tiny")
    several = [*TORCHRUN, "--standalone", "--nproc-per-node", "8"]
    assert tables(1, "q1", "deit_tiny", NPROC="8") == [[config, run, *several, "--resume", "auto"]]
    nodes = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "node-a", "--master-port", "29500"]
    given = {"NPROC": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-a"}
    several = [*TORCHRUN, *nodes, "--nproc-per-node", "8"]
    assert tables(1, "q1", "deit_tiny", **given) == [[config, run, *several, "--resume", "auto"]]


def test_a_row_of_several_models(tables: Tables) -> None:
    expected = [tables.run(f"table1_q1_{m}", f"ablations/table1.yaml#q1/{m}") for m in ("deit_tiny", "deit_small")]
    assert tables(1, "q1", "--", "--lr", "1") == [[*run, "--lr", "1"] for run in expected]


def test_a_row_that_is_the_same_run_as_another(tables: Tables) -> None:
    assert tables(4, "tetrajet_qema", "deit_small") == [tables.run("deit_small_qema", "deit_small_qema.yaml")]
    shared = tables.run("table8_qema_default_deit_base", "ablations/table8.yaml#qema_default/deit_base")
    assert tables(9, "decay_0.998") == [shared]


def test_one_folder_is_for_one_run(tables: Tables) -> None:
    assert [run[1] for run in tables(9, "decay_0.995", OUTPUT_DIR="mine")] == ["mine"]
    assert tables(1, "q1", OUTPUT_DIR="mine") == []
    assert (tables.result.returncode, tables.result.stderr) == (
        2,
        "error: OUTPUT_DIR and --output_dir are the folder of one run; RUNS_DIR is that of several.\n",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["q7"], "Table 1 has no row q7; did you mean q"),
        (["everything"], "Table 1 has no row everything; there are full_precision, q1, q2, q3, q4, q5, q6, all_quant"),
        (["q1", "deit_tny"], "Table 1 has no model deit_tny; did you mean deit_tiny?"),
        (["all", "swin_tiny"], "Table 1 has no model swin_tiny; did you mean deit_tiny?"),
        (
            ["q1", "deit_tiny", "deit_small"],
            "table1.sh takes ROW [MODEL], or all [MODEL]; got q1 deit_tiny deit_small.",
        ),
        (["--smoke"], "table1.sh takes ROW [MODEL], or all [MODEL] before the flags."),
        (["all", "--lr", "fast"], "the command line: optim.lr is 'fast': input should be a valid number"),
        (["all", "--epoch", "3"], "There is no flag --epoch; did you mean --epochs?"),
    ],
)
def test_a_mistake_at_a_table_script(tables: Tables, words: list[str], message: str) -> None:
    assert tables(1, *words) == []
    assert (tables.result.returncode, tables.result.stdout) == (2, "")
    assert tables.result.stderr.startswith(f"error: {message}")
    assert len(tables.result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "table.sh needs the number of a table, as in: bash scripts/table.sh 1 ROW [MODEL] [flags of main.py]"),
        (["11"], "There is no table 11; there are 1, 2, 3, 4, 5, 6, 7, 8, 9, 10."),
        (["11", "q1"], "There is no table 11; there are 1, 2, 3, 4, 5, 6, 7, 8, 9, 10."),
        (["one"], "one is neither the number of a table nor a study's file, such as configs/studies/digits.yaml."),
    ],
)
def test_a_table_that_is_none(tables: Tables, words: list[str], sentence: str) -> None:
    result = bash(SCRIPTS / "table.sh", *words, env=tables.environment(), cwd=tables.runs_dir.parent)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {sentence}\n")


def test_all_runs_what_is_missing(tables: Tables) -> None:
    tables.make("deit_tiny_tetrajet", "deit_tiny_tetrajet.yaml")  # complete
    tables.make("table7_e2m1_e3m0_deit_tiny", "ablations/table7.yaml#e2m1/e3m0", epochs=89)
    tables.make(
        "table7_e3m0_e2m1_deit_tiny", "ablations/table7.yaml#e3m0/e2m1", "run.seed=1"
    )  # complete, but another run
    missing = [
        tables.run(f"table7_{row.replace('/', '_')}_deit_tiny", f"ablations/table7.yaml#{row}/deit_tiny")
        for row in ("e2m1/e3m0", "e3m0/e2m1", "e3m0/e3m0")
    ]
    assert tables(7, "all") == missing
    assert tables.result.stderr == f"{tables.runs_dir / 'deit_tiny_tetrajet'} is complete.\n"
    assert [line for line in tables.result.stdout.splitlines() if line.startswith("==")] == [
        f"== configs/ablations/table7.yaml#{row}/deit_tiny" for row in ("e2m1/e3m0", "e3m0/e2m1", "e3m0/e3m0")
    ]


def test_all_with_everything_complete(tables: Tables) -> None:
    for name in ("deit_base_tetrajet", "deit_base_qema", "deit_base_qramping"):
        tables.make(name, f"{name}.yaml")
    for row in ("without_wq", "without_wq_aq"):
        tables.make(f"table6_{row}_deit_base", f"ablations/table6.yaml#{row}")
    assert tables(6, "all") == []
    assert (tables.result.returncode, tables.result.stdout) == (0, "")
    assert len(tables.result.stderr.splitlines()) == 5


def test_a_failure_ends_a_table(tables: Tables) -> None:
    assert len(tables(1, "q1", STATUS="3")) == 1
    assert tables.result.returncode == 3
    assert tables.result.stderr.startswith(
        "table.sh: configs/ablations/table1.yaml#q1/deit_tiny ended with exit code 3;"
    )


def test_a_stopped_table_waits_for_its_run(tables: Tables, tmp_path: Path) -> None:
    """As from Slurm: the signal goes to all processes, and the run needs time to save its state."""
    saved = tmp_path / "saved"
    run = executable(tmp_path / "train", f'trap "sleep 0.5; touch {saved}; exit 143" TERM; sleep 60 & wait\n')
    command = ["bash", str(SCRIPTS / "table1.sh"), "q1"]
    env = tables.environment(THEN=f"exec bash {run}")
    process = subprocess.Popen(
        command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not tables.started() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    assert saved.exists()
    assert len(tables.started()) == 1
