#!/usr/bin/env bash
# Sets up and trains a small DeiT on scikit-learn's handwritten digits in full precision, Microscaling, TetraJet, and
# TetraJet with Q-EMA and with Q-Ramping, through the same main.py and configs as a real run; ends in a table,
# runs/quickstart/curves.png and the oscillation of the weights in runs/quickstart/figures/.
# A run that was stopped goes on where it was; delete runs/quickstart to start over. Flags are passed on to main.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="$(bash scripts/setup.sh)"

# One thread: the tensors are so small that a second one waits more than it works.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

train() {  # methods, one after the other; every line says whose it is
    local method
    for method in "${@:2:$1}"; do
        "$PYTHON" main.py --config "configs/digits_$method.yaml" --output_dir "runs/quickstart/$method" --resume auto \
            "${@:$1+2}" 2>&1 | while IFS= read -r line; do echo "$method: $line"; done || return
    done
}

# Two at a time, each on a core.
train 2 tetrajet qema "$@" &
train 3 fp microscaling qramping "$@" || { code=$?; wait; exit $code; }
wait $!

runs=()
for method in fp microscaling tetrajet qema qramping; do runs+=("runs/quickstart/$method"); done
"$PYTHON" report.py curves "${runs[@]}" --png runs/quickstart/curves.png
"$PYTHON" report.py figures "${runs[@]}" --out runs/quickstart/figures
