#!/usr/bin/env bash
# The rows of a table of the paper; table1.sh to table10.sh call this with their number.
#
#   bash scripts/table1.sh                           lists the rows: published figures, commands
#   bash scripts/table1.sh q1 deit_tiny [flags]      one run; without a model, one run for each model of the row
#   bash scripts/table1.sh all [MODEL] [flags]       every run that is not complete yet, one after the other
#
# Flags are main.py's. The environment variables are those of scripts/run.sh (DATA_PATH, RUNS_DIR, NPROC, NNODES, ...);
# on several nodes, start the same line on each of them. A row that is the same run as another has that run's folder.
# Started again, it goes on where it stopped. The first run that fails or is stopped ends it, with that run's exit code.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
if [ $# = 0 ]; then
    echo "error: table.sh needs the number of a table, as in: bash scripts/table.sh 1 ROW [MODEL] [flags of main.py]" >&2
    exit 2
fi
table="$1"
shift
words=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
    words+=("$1")
    shift
done
if [ "${1:-}" = -- ]; then shift; fi

PYTHON="${PYTHON:-$(bash "$root/scripts/setup.sh")}"
export PYTHON
if [ ${#words[@]} = 0 ]; then
    case "${1:---help}" in
        --help | -h) exec "$PYTHON" "$root/study.py" list "$table" ;;
    esac
fi
plan="$("$PYTHON" "$root/study.py" plan "$table" ${words[@]+"${words[@]}"} --runs-dir "${RUNS_DIR:-$root/runs}" -- "$@")"
configs=()
while IFS= read -r line; do
    if [ -n "$line" ]; then configs+=("$line"); fi
done <<<"$plan"
if [ ${#configs[@]} = 1 ]; then exec bash "$root/scripts/run.sh" "${configs[0]}" "$@"; fi

stopped=""
trap 'stopped=1' INT TERM # bash would leave before the run has saved its state
for config in ${configs[@]+"${configs[@]}"}; do
    echo "== ${config#"$root/"}"
    status=0
    bash "$root/scripts/run.sh" "$config" "$@" || status=$?
    if [ "$status" != 0 ]; then
        echo "table.sh: ${config#"$root/"} ended with exit code $status; what comes after it was not started" >&2
        exit "$status"
    elif [ -n "$stopped" ]; then
        exit 143
    fi
done
