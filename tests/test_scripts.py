"""The shell scripts: command lines of run.sh, the scripts of the rows, and some of them for real."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from script_helpers import ROOT, SCRIPTS, STUB, TORCHRUN, bash, clean_env, executable

from config import load_config
from config.rows import Cell, all_cells

# Scripts of one configuration each, which has their name; others in scripts/ may be a user's own.
ROWS = sorted(p for p in SCRIPTS.glob("*.sh") if (ROOT / f"configs/{p.stem}.yaml").is_file())
TABLE_2 = [
    f"{model}_{method}"
    for model in ("deit_tiny", "deit_small", "deit_base", "swin_tiny", "swin_small")
    for method in ("fp", "int4", "microscaling", "tetrajet", "qema", "qramping")
]
CELLS = all_cells()
ROWS_OF = ("ablations", "studies")  # folders of configs/ whose files are no configurations but rows of them


@pytest.mark.parametrize("script", [*sorted(SCRIPTS.glob("*.sh")), ROOT / ".ci/run"], ids=lambda p: p.name)
def test_bash_accepts_the_syntax(script: Path) -> None:
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


# ---------------------------------------------------------------------------------------------------------------------
# run.sh
# ---------------------------------------------------------------------------------------------------------------------


class Launcher:
    """run.sh with a Python that records its arguments instead of running them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "record"
        self.python = executable(folder / "my bin" / "python", STUB)
        self.path = f"{folder / 'my bin'}{os.pathsep}{os.environ['PATH']}"
        self.result: subprocess.CompletedProcess

    def __call__(self, *flags: str, config: str = "configs/a.yaml", **env: str) -> list[str]:
        self.record.unlink(missing_ok=True)
        real = {"REAL_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        full = clean_env(PYTHON=self.python, RECORD=self.record, PATH=self.path, **real, **env)
        self.result = bash(SCRIPTS / "run.sh", config, *flags, env=full, cwd=self.folder)
        return self.record.read_text().splitlines() if self.record.exists() else []


@pytest.fixture
def launch(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


MAIN = [str(ROOT / "main.py"), "--config", "configs/a.yaml", "--output_dir", str(ROOT / "runs/a")]


def test_run_one_process(launch: Launcher) -> None:
    assert launch(NPROC="1") == [*MAIN, "--resume", "auto"]
    assert launch.result.returncode == 0


def test_run_keeps_the_exit_code_of_one_process(launch: Launcher) -> None:
    launch(NPROC="1", STATUS="143")
    assert launch.result.returncode == 143


def test_run_four_processes(launch: Launcher) -> None:
    assert launch(NPROC="4") == [*TORCHRUN, "--standalone", "--nproc-per-node", "4", *MAIN, "--resume", "auto"]


def test_run_two_nodes(launch: Launcher) -> None:
    def expected(rank: str, address: str, port: str) -> list[str]:
        nodes = ["--nnodes", "2", "--node-rank", rank, "--master-addr", address, "--master-port", port]
        return [*TORCHRUN, *nodes, "--nproc-per-node", "8", *MAIN, "--resume", "auto"]

    given = {"NPROC": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-a", "MASTER_PORT": "1234"}
    assert launch(**given) == expected("1", "node-a", "1234")
    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node-[a-b]"}
    executable(
        launch.python.parent / "scontrol", '[ "$*" = "show hostnames node-[a-b]" ] && printf "node-a\\nnode-b\\n"'
    )
    assert launch(NPROC="8", **slurm) == expected("1", "node-a", "29500")
    assert launch(**given, **slurm | {"SLURM_NNODES": "3"}) == expected("1", "node-a", "1234")  # ours win over Slurm's


def test_run_two_nodes_without_an_address(launch: Launcher) -> None:
    assert launch(NPROC="8", NNODES="2") == []
    assert launch.result.returncode == 2
    assert "MASTER_ADDR" in launch.result.stderr


@pytest.mark.parametrize("bad", [{"NPROC": "four"}, {"NPROC": "1", "NNODES": "0"}, {"NPROC": "-1"}])
def test_run_refuses_a_bad_number(launch: Launcher, bad: dict[str, str]) -> None:
    assert launch(**bad) == []
    assert launch.result.returncode == 2
    assert "must be whole numbers" in launch.result.stderr


NODES = {"NPROC": "2", "NNODES": "2", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"NPROC": ""}, None),  # as if it were not set
        ({"NPROC": "2.5"}, "NNODES and NPROC must be whole numbers from 1, not '1' and '2.5'"),
        ({"NPROC": "9" * 30}, "NNODES and NPROC must be whole numbers"),
        ({"NPROC": "1:2"}, "NNODES and NPROC must be whole numbers"),
        ({"NPROC": "1", "NNODES": "two"}, "NNODES and NPROC must be whole numbers"),
        ({"NPROC": "1", "SLURM_NNODES": "1-2"}, "NNODES and NPROC must be whole numbers"),
        *(({**NODES, "NODE_RANK": rank}, f"NODE_RANK must be a whole number from 0 to 1, not '{rank}'")
          for rank in ("x", "-1", "2", "1.0", "$(id)")),
        ({**NODES, "SLURM_NODEID": "7"}, "NODE_RANK must be a whole number from 0 to 1, not '7'"),
        *(({**NODES, "MASTER_PORT": port}, f"MASTER_PORT must be a whole number from 1 to 65535, not '{port}'")
          for port in ("x", "0", "-1", "65536", "99999999999", "80a")),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)  # fmt: skip
def test_run_refuses_what_is_no_number(launch: Launcher, env: dict[str, str], said: str | None) -> None:
    words = launch(**env)
    if said is None:
        assert words and launch.result.returncode == 0
        return
    assert (words, launch.result.returncode) == ([], 2)
    assert launch.result.stderr.startswith(f"run.sh: {said}") and len(launch.result.stderr.splitlines()) == 1


def test_run_takes_numbers_with_leading_zeros(launch: Launcher) -> None:
    assert launch(NPROC="08") == [*TORCHRUN, "--standalone", "--nproc-per-node", "8", *MAIN, "--resume", "auto"]


def test_run_names_a_port_in_use(launch: Launcher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert launch(**NODES, MASTER_PORT=port) == []
        assert launch.result.returncode == 2
        assert launch.result.stderr == (
            f"run.sh: port {port} of this node is in use; set MASTER_PORT to a free one, the same on all nodes\n"
        )
        assert launch(**NODES, MASTER_PORT=port, NODE_RANK="1")  # it is node 0's port
    assert launch(**NODES, MASTER_PORT=port)


def test_run_names_a_python_that_is_none(tmp_path: Path) -> None:
    env = clean_env(PYTHON=tmp_path / "nowhere", NPROC="1")
    result = bash(SCRIPTS / "run.sh", "configs/a.yaml", env=env, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (2, f"run.sh: there is no program at PYTHON={tmp_path / 'nowhere'}\n")


@pytest.mark.parametrize(
    ("flags", "env", "sentence"),
    [
        ([], {"NPROC": "3"}, "The global batch of 1024 does not divide among 3 processes."),
        ([], {**NODES, "NPROC": "3"}, "The global batch of 1024 does not divide among 6 processes."),
        (["--global-batch", "30"], {"NPROC": "4"}, "The global batch of 30 does not divide among 4 processes."),
        (["--batch-size", "100"], {"NPROC": "2"}, "The global batch of 1024 is not a multiple of 2 process(es) x 100"),
        (["--epoch", "3"], {"NPROC": "2"}, "There is no flag --epoch; did you mean --epochs?"),
        (["--lr", "fast"], {"NPROC": "2"}, "the command line: optim.lr is 'fast': input should be a valid number"),
    ],
)
def test_run_says_a_mistake_once_and_not_once_a_process(
    launch: Launcher, flags: list[str], env: dict[str, str], sentence: str
) -> None:
    assert launch(*flags, config="configs/deit_tiny_fp.yaml", **env) == []
    assert launch.result.returncode == 2
    assert launch.result.stderr.startswith(f"error: {sentence}") and len(launch.result.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--smoke"], ["--eval", "--resume", "x.pt"], ["--global-batch", "30"]], ids=" ".join)
def test_run_starts_where_the_processes_fit(launch: Launcher, flags: list[str]) -> None:
    assert launch(*flags, config="configs/deit_tiny_fp.yaml", NPROC="3")[:2] == TORCHRUN


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_run_runs_no_module_of_the_callers_folder(processes: str, tmp_path: Path) -> None:
    """`python -m`, which starts torchrun, looks there first."""
    for name in ("torch", "yaml", "argparse", "json", "config", "numpy", "typing", "main"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the caller was run')\n")
    env = clean_env(PYTHON=sys.executable, NPROC=processes, OMP_NUM_THREADS="1")
    tiny = ["--smoke", "--device", "cpu", "--input-size", "32", "--model.kwargs", "{depth: 1, embed_dim: 48}"]
    command = ["bash", str(SCRIPTS / "run.sh"), "configs/digits_fp.yaml", *tiny, "--model.patch_size", "16"]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "smoke test passed" in result.stdout, result.stderr


def test_run_counts_gpus_without_the_callers_torch(launch: Launcher) -> None:
    """Where there is a driver and no nvidia-smi, torch is asked."""
    line = next(line for line in (SCRIPTS / "run.sh").read_text().splitlines() if "device_count()" in line)
    code = line.split("'")[1].replace("torch.cuda.device_count()", "torch.__name__")
    (launch.folder / "torch.py").write_text("raise SystemExit('torch.py of the caller was run')\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=launch.folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "torch\n"), done.stderr


def test_run_counts_gpus(launch: Launcher) -> None:
    """MIG instances are listed below their GPU and do not count; CUDA_VISIBLE_DEVICES does."""
    executable(launch.python.parent / "nvidia-smi", 'printf "GPU 0: A\\n  MIG 1g: b\\nGPU 1: A\\nGPU 2: A\\n"')
    assert launch()[:5] == [*TORCHRUN, "--standalone", "--nproc-per-node", "3"]
    assert launch(CUDA_VISIBLE_DEVICES="0,2")[:5] == [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    for one in ("1", "", "-1"):
        assert launch(CUDA_VISIBLE_DEVICES=one) == [*MAIN, "--resume", "auto"]
    executable(launch.python.parent / "nvidia-smi", "echo no driver; exit 9")
    assert launch() == [*MAIN, "--resume", "auto"]


@pytest.mark.parametrize(
    "flags",
    [["--smoke"], ["--resume", "x.pt"], ["--resume=x.pt"], ["--run.resume", "x.pt"], ["--run.resume=x.pt"]],
    ids=" ".join,
)
def test_run_leaves_resume_to_the_user(launch: Launcher, flags: list[str]) -> None:
    assert launch(*flags, NPROC="1") == [*MAIN, *flags]


@pytest.mark.parametrize("flag", ["--print-config", "--print_config", "--help", "-h"])
def test_run_prints_with_one_process(launch: Launcher, flag: str) -> None:
    assert launch(flag, NPROC="4") == [*MAIN, flag]


def test_run_passes_paths_and_flags_on(launch: Launcher) -> None:
    words = launch("--lr", "1e-3", "--output_dir", "third place", NPROC="1", DATA_PATH="my data", OUTPUT_DIR="my run")
    before = [*MAIN[:3], "--data-path", "my data", "--output_dir", "my run", "--resume", "auto"]
    assert words == [*before, "--lr", "1e-3", "--output_dir", "third place"]  # the user's flags come last and win


def test_run_finds_a_configuration_of_the_repository_from_anywhere(launch: Launcher) -> None:
    name = "configs/common/deit_90ep.yaml"
    assert launch(config=name, NPROC="1")[:3] == [*MAIN[:2], str(ROOT / name)]
    (launch.folder / "configs/common").mkdir(parents=True)
    (launch.folder / name).touch()
    assert launch(config=name, NPROC="1")[:3] == [*MAIN[:2], name]  # the folder one is in comes first


def test_run_a_row_of_a_table(launch: Launcher) -> None:
    """Its run is named by the row, or is the run that the row is the same as; from any folder."""
    table = "configs/ablations/table8.yaml"
    for row, name in (
        ("qema_default/deit_base", "table8_qema_default_deit_base"),
        ("tetrajet/swin_tiny", "swin_tiny_tetrajet"),
    ):
        words = launch("--lr", "1", config=f"{table}#{row}", NPROC="1")
        main = [MAIN[0], "--config", f"{ROOT / table}#{row}", "--output_dir", str(ROOT / "runs" / name)]
        assert words == [*main, "--resume", "auto", "--lr", "1"]
    assert launch(config=f"{table}#tetrajet/swin", NPROC="1") == []
    assert launch.result.returncode == 2
    assert launch.result.stderr.endswith("there is no column swin; did you mean swin_tiny?\n")


def test_run_in_a_folder_of_runs(launch: Launcher) -> None:
    assert launch(NPROC="1", RUNS_DIR="my runs") == [*MAIN[:4], "my runs/a", "--resume", "auto"]
    assert launch(NPROC="1", RUNS_DIR="my runs", OUTPUT_DIR="my run")[:5] == [*MAIN[:4], "my run"]


def test_run_without_a_configuration(launch: Launcher) -> None:
    assert launch(config="--smoke") == []
    assert launch.result.returncode == 2
    assert launch.result.stderr.startswith("usage:")


# ---------------------------------------------------------------------------------------------------------------------
# The scripts and configurations of the rows
# ---------------------------------------------------------------------------------------------------------------------


def test_every_row_of_table_2_has_a_script() -> None:
    assert {*TABLE_2, "tiny_imagenet_tetrajet"} <= {p.stem for p in ROWS}
    assert len(TABLE_2) == 30


@pytest.mark.parametrize("script", ROWS, ids=lambda p: p.stem)
def test_row_script_starts_its_own_configuration(script: Path, launch: Launcher, tmp_path: Path) -> None:
    config = ROOT / "configs" / f"{script.stem}.yaml"
    load_config(config)
    env = clean_env(PYTHON=launch.python, RECORD=launch.record, NPROC="1")
    result = bash(script, "--lr", "1", env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    words = launch.record.read_text().splitlines()
    assert words[words.index("--config") + 1] == str(config)
    assert words[words.index("--output_dir") + 1] == str(ROOT / "runs" / script.stem)
    assert words[-2:] == ["--lr", "1"]
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("name", TABLE_2)
def test_row_script_states_the_published_top1(name: str) -> None:
    paper = load_config(ROOT / f"configs/{name}.yaml").paper
    assert f"published top-1 {paper.top1:.2f} %" in (SCRIPTS / f"{name}.sh").read_text()
    assert "Table 2," in (SCRIPTS / f"{name}.sh").read_text()
    assert f"top-1 {paper.top1:.2f} %" in (ROOT / f"configs/{name}.yaml").read_text().splitlines()[0]


@pytest.mark.parametrize(
    "path",
    sorted({*ROOT.glob("configs/**/*.yaml")} - {p for kind in ROWS_OF for p in ROOT.glob(f"configs/{kind}/**/*")}),
    ids=lambda p: p.stem,
)
def test_configuration_loads(path: Path) -> None:
    load_config(path)


# ---------------------------------------------------------------------------------------------------------------------
# For real: a few small ones, and all of them at full size. tests/test_paper_rows.py trains a spread without scripts.
# ---------------------------------------------------------------------------------------------------------------------


def smoking(script: Path, *words: str, cwd: Path) -> subprocess.Popen[str]:
    env = clean_env(PYTHON=sys.executable, NPROC="1", OMP_NUM_THREADS="1")
    command, pipe = ["bash", str(script), *words, "--smoke", "--device", "cpu"], subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=cwd, stdout=pipe, stderr=pipe, text=True)


def smoke(process: subprocess.Popen[str], cwd: Path) -> None:
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.splitlines()[-1].startswith("smoke test passed")
    assert not list(cwd.iterdir())


REAL = [("table1.sh", "q1", "deit_tiny"), ("swin_tiny_int4.sh",)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, ...], tuple[Any, Path]]]:
    """Those of REAL, side by side: a core is free while the other waits for Python's imports."""
    started = {}
    for words in REAL:
        shape = "{depth: 1}" if "swin" not in words[0] else "{depths: [1, 1, 1, 1]}"
        flags, cwd = ["--input-size", "32", "--model.kwargs", shape], tmp_path_factory.mktemp("real")
        started[words] = smoking(SCRIPTS / words[0], *words[1:], *flags, cwd=cwd), cwd
    yield started
    for process, _ in started.values():
        process.kill()


@pytest.mark.parametrize("words", REAL, ids=" ".join)
def test_a_script_for_real(words: tuple[str, ...], real: dict[tuple[str, ...], tuple[Any, Path]]) -> None:
    smoke(*real[words])


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE_2)
def test_every_script_of_table_2(name: str, tmp_path: Path) -> None:
    smoke(smoking(SCRIPTS / f"{name}.sh", cwd=tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [c for c in CELLS if not c.same], ids=lambda c: f"{c.table}-{c.row}-{c.column}")
def test_every_row_with_a_run_of_its_own(cell: Cell, tmp_path: Path) -> None:
    """With the scripts of Table 2 all 75 runs. tests/test_paper_rows.py says that each other row starts one of them."""
    smoke(smoking(SCRIPTS / f"table{cell.table}.sh", cell.row, cell.column, cwd=tmp_path), tmp_path)
