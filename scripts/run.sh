#!/usr/bin/env bash
# Runs one configuration on this machine's GPUs, or on the CPU where there is none; the scripts of the rows call this.
#
#   bash scripts/run.sh configs/deit_tiny_tetrajet.yaml [flags of main.py; they win over the configuration]
#   bash scripts/run.sh configs/ablations/table1.yaml#q1/deit_tiny        # a row of a table; scripts/table1.sh lists them
#
# Environment                                                        Default
#   DATA_PATH     folder of the data set (--data-path)               data.path of the configuration
#   RUNS_DIR      folder that the folder of the run is made in       runs in the repository
#   OUTPUT_DIR    folder of the run (--output_dir)                   $RUNS_DIR/<name of the configuration>
#   NPROC         processes on this node                             one for each GPU; 1 without a GPU
#   NNODES        nodes; start this script once on each of them      SLURM_NNODES, else 1
#   NODE_RANK     number of this node, from 0                        SLURM_NODEID, else 0
#   MASTER_ADDR   host name of node 0                                under Slurm its first node
#   MASTER_PORT   a free port of node 0                              29500
#   PYTHON        Python to run with, used as it is                  the one that scripts/setup.sh prints
#
# A run goes on where it stopped when it is started again with the same OUTPUT_DIR (--resume auto). Paths are relative
# to the folder you are in (CONFIG also to the repository). One process keeps main.py's exit code; with several, torchrun
# exits 1 if any of them fails.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: bash scripts/run.sh CONFIG [flags of main.py]" >&2
    exit 2
fi
die() {
    echo "run.sh: $1" >&2
    exit 2
}
config="$1"
shift
row=""
case "$config" in *.yaml#*) row="#${config##*.yaml#}" ;; esac
file="${config%"$row"}"
if [ ! -e "$file" ] && [ -e "$root/$file" ]; then config="$root/$config"; fi

single="" # print and leave: one process is enough
resume=(--resume auto)
for word in "$@"; do
    case "$word" in
        --print[-_]config | --help | -h) single=1 resume=() ;;
        --smoke | --resume | --resume=* | --run.resume | --run.resume=*) resume=() ;;
    esac
done

PYTHON="${PYTHON:-$(bash "$root/scripts/setup.sh")}"
command -v -- "$PYTHON" >/dev/null || die "there is no program at PYTHON=$PYTHON"

name="$(basename -- "$file" .yaml)"
if [ -n "$row" ]; then name="$("$PYTHON" "$root/study.py" name "$config")"; fi # it may be the same run as another

gpus() {
    if ! command -v nvidia-smi >/dev/null; then
        if [ -e /dev/nvidiactl ] || [ -e /dev/kfd ]; then
            # Without the folder one is in, whose torch.py would be run.
            "$PYTHON" -c 'import sys; sys.path = [p for p in sys.path if p]; import torch; print(torch.cuda.device_count())'
        else
            echo 0
        fi
    elif [ "${CUDA_VISIBLE_DEVICES+set}" ]; then
        echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -cv '^$' || true
    else
        { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true
    fi
}

nnodes="${NNODES:-${SLURM_NNODES:-1}}"
if [ -n "$single" ]; then
    nnodes=1
    nproc=1
else
    nproc="${NPROC:-$(gpus)}"
    if [ "$nproc" = 0 ]; then nproc=1; fi
fi
whole() { # whether $1 is a whole number from $2 to $3
    case "$1" in '' | *[!0-9]* | ??????*) return 1 ;; esac
    [ "$((10#$1))" -ge "$2" ] && [ "$((10#$1))" -le "$3" ]
}
if ! whole "$nnodes" 1 99999 || ! whole "$nproc" 1 99999; then
    die "NNODES and NPROC must be whole numbers from 1, not '$nnodes' and '$nproc'"
fi
nnodes=$((10#$nnodes)) nproc=$((10#$nproc))

launch=("$PYTHON")
if [ "$nnodes" -gt 1 ]; then
    address="${MASTER_ADDR:-}"
    if [ -z "$address" ] && [ -n "${SLURM_JOB_NODELIST:-}" ] && command -v scontrol >/dev/null; then
        address="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
    fi
    if [ -z "$address" ]; then die "NNODES is $nnodes; set MASTER_ADDR to the host name of node 0"; fi
    rank="${NODE_RANK:-${SLURM_NODEID:-0}}" port="${MASTER_PORT:-29500}"
    whole "$rank" 0 $((nnodes - 1)) || die "NODE_RANK must be a whole number from 0 to $((nnodes - 1)), not '$rank'"
    whole "$port" 1 65535 || die "MASTER_PORT must be a whole number from 1 to 65535, not '$port'"
    if [ "$((10#$rank))" = 0 ] && (exec 3<>"/dev/tcp/127.0.0.1/$((10#$port))") 2>/dev/null; then
        die "port $port of this node is in use; set MASTER_PORT to a free one, the same on all nodes"
    fi
    launch+=(-m torch.distributed.run --nnodes "$nnodes" --node-rank "$rank"
        --master-addr "$address" --master-port "$port" --nproc-per-node "$nproc")
elif [ "$nproc" -gt 1 ]; then
    launch+=(-m torch.distributed.run --standalone --nproc-per-node "$nproc")
fi
if [ ${#launch[@]} -gt 1 ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun's own default; set here, it says nothing about it
    # A mistake is one sentence here, and one of each process once torchrun has started them.
    if [ -e "${config%"$row"}" ]; then "$PYTHON" "$root/study.py" check "$config" "$((nnodes * nproc))" -- "$@"; fi
    # `python -m` looks for modules in the folder one is in first, torch.py among them; from 3.11 on it can be told not
    # to, and main.py, which is told too, then finds its own modules by PYTHONPATH.
    export PYTHONSAFEPATH=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
fi

# ${resume[@]+...}: an empty array is an unset variable to bash before 4.4.
exec "${launch[@]}" "$root/main.py" --config "$config" ${DATA_PATH:+--data-path "$DATA_PATH"} \
    --output_dir "${OUTPUT_DIR:-${RUNS_DIR:-$root/runs}/$name}" ${resume[@]+"${resume[@]}"} "$@"
