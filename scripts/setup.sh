#!/usr/bin/env bash
# Finds or makes a Python environment that meets the pinned requirements, and prints the path of its Python.
#
#   PYTHON="$(bash scripts/setup.sh [requirements file])"     # default: requirements.txt
#
# In this order: an environment that is active (VIRTUAL_ENV, CONDA_PREFIX) and meets the pins; .venv in the repository
# root, once complete; a plain python3 that meets the pins; else .venv is made, or completed, from the pins.
# PYTHON=/path/to/python3.12 names the Python to use or to make .venv with. Remove .venv to make it anew.
# Everything but the path goes to stderr. Exit codes: 1 the set-up failed, 2 no Python or file it could start from.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
requirements="${1:-requirements.txt}"
venv="$root/.venv"
stamp="$venv/.stamp"           # one line for each requirements file met; written last
incomplete="$venv/.incomplete" # there while we change .venv; found at the start, it means an interrupted set-up
log="$venv/install.log"

say() { echo "setup: $*" >&2; }
die() {
    say "$2"
    exit "$1"
}

# A change in any requirements file makes every stamp old.
fingerprint() { echo "$(cat -- requirements*.txt "$1" | cksum) $1"; }

# meets PYTHON FILE: exit 0 if the environment of PYTHON has exactly what FILE pins; else one line says what differs.
meets() {
    "$1" -c '
import importlib.metadata, pathlib, sys
try:
    from packaging.requirements import Requirement
except ImportError:
    sys.exit("it lacks the packages")
def pins(path):
    for line in path.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r"):
            yield from pins(path.parent / line[2:].strip())
        elif line:
            yield Requirement(line)
build = {}
for pin in pins(pathlib.Path(sys.argv[1])):
    if pin.marker and not pin.marker.evaluate():
        continue
    try:
        version = importlib.metadata.version(pin.name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if not version or not pin.specifier.contains(version, prereleases=True):  # == accepts any local suffix, +cu128
        sys.exit(f"it has {pin.name} {version}, not {pin.specifier}")
    build[pin.name] = (version.partition("+")[2] or "cu130")[:4]  # these pins without a suffix are built for CUDA 13.0
if build.get("torch") != build.get("torchvision"):
    sys.exit("its torch ({torch}) and torchvision ({torchvision}) are different builds".format(**build))
' "$2" 2>&1
}

# probe PYTHON: its minor version, its own path outside of any environment, and whether it can make environments.
probe() {
    "$1" -c '
import sys
version = "%d.%d" % sys.version_info[:2]
try:
    import ensurepip, venv
    print("%s yes %s" % (version, getattr(sys, "_base_executable", sys.executable)))
except ImportError:
    print("%s no %s" % (version, sys.executable))
' 2>/dev/null
}

# base_python: sets `base` to a Python that .venv can be made with.
base_python() {
    local candidate minor can path unfit="" bare=""
    set -- python3 python3.12 python3.11 python3.10 python3.13 python3.14
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; fi
    for candidate in "$@"; do
        read -r minor can path < <(probe "$candidate") || continue
        case "$minor $can" in
            3.1[0-4]" yes") base="$path" && return ;;
            3.1[0-4]" no") bare="${bare:-$minor}" ;;
            *) unfit="${unfit:+$unfit, }$candidate is $minor" ;;
        esac
    done
    if [ -n "$bare" ]; then
        die 2 "Python $bare cannot make environments (ensurepip is missing); on Debian or Ubuntu: apt install python$bare-venv"
    fi
    die 2 "Python 3.10 to 3.14 is needed and was not found (${unfit:-${PYTHON:-python3} does not answer}); install one, or name it: PYTHON=/path/to/python3.12"
}

# 1. An environment the user chose.
active=""
if [ -n "${PYTHON:-}" ]; then
    active="$(command -v -- "$PYTHON")" || die 2 "there is no Python at PYTHON=$PYTHON"
    case "$active" in /*) ;; *) active="$PWD/$active" ;; esac
    PYTHON="$active"
elif [ -n "${VIRTUAL_ENV:-}" ]; then
    active="$VIRTUAL_ENV/bin/python"
elif [ -n "${CONDA_PREFIX:-}" ]; then
    active="$CONDA_PREFIX/bin/python"
fi
cd "$root"
[ -f "$requirements" ] || die 2 "there is no requirements file $requirements in $root"
why=""
if [ -n "$active" ] && ! { [ -e "$incomplete" ] && [ "$active" -ef "$venv/bin/python" ]; }; then
    if why="$(meets "$active" "$requirements")"; then
        echo "$active"
        exit
    fi
fi

if [ -n "${PYTHON:-}" ]; then base_python; fi # a PYTHON that cannot be used is a mistake, whatever else is there

# 2. .venv, complete.
complete() {
    [ ! -e "$incomplete" ] && [ -f "$stamp" ] && grep -Fxq -- "$(fingerprint "$requirements")" "$stamp" &&
        "$venv/bin/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("pip") is None)' 2>/dev/null
}
if complete; then
    echo "$venv/bin/python"
    exit
fi

# 3. A plain python3.
if [ -z "$active" ] && plain="$(command -v python3)" && meets "$plain" "$requirements" >/dev/null; then
    echo "$plain"
    exit
fi

# 4. Make or complete .venv, one set-up at a time.
base_python
[ -z "$why" ] || say "$active is not used: $(echo "$why" | tail -n 1)"
mkdir -p "$venv"
exec 9>"$venv/.lock"
"$base" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("setup: waiting for another set-up of this checkout", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError:
    pass  # a file system without locks
'
if complete; then
    echo "$venv/bin/python"
    exit
fi
if [ -e "$incomplete" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
    touch "$incomplete"
    say "making .venv with $base"
    if ! "$base" -m venv "$venv" >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        die 1 "$base could not make the environment .venv"
    fi
elif [ -f "$stamp" ]; then
    touch "$incomplete"
else
    say "completing the .venv that is already here" # made by hand: never marked, so never removed
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >"$log" 2>&1 || true
fi
say "installing $requirements into .venv (the first time about 5 GB on Linux, CUDA included; details in .venv/install.log)"
progress='/\.metadata/d; s/^ *\(Downloading .*\)/setup:   \1/p; s/^Installing collected packages.*/setup:   Unpacking/p'
if ! PYTHONUNBUFFERED=1 "$venv/bin/python" -m pip install --disable-pip-version-check -r "$requirements" 2>&1 |
    tee "$log" | sed -n "$progress" >&2; then
    tail -n 15 "$log" >&2
    die 1 "pip could not install $requirements; its last lines are above, all of them in .venv/install.log"
fi
if ! why="$("$venv/bin/python" -c 'import torch, torchvision' 2>&1)"; then
    echo "$why" | tail -n 5 >&2
    die 1 "the installed torch and torchvision do not load; the error is above"
fi
if ! why="$(meets "$venv/bin/python" "$requirements")"; then
    die 1 ".venv does not meet $requirements after the installation: $(echo "$why" | tail -n 1)"
fi
for file in "$requirements" requirements*.txt; do
    if meets "$venv/bin/python" "$file" >/dev/null; then fingerprint "$file"; fi
done >"$stamp"
rm -f "$incomplete"
say "done"
echo "$venv/bin/python"
