#!/usr/bin/env bash
# The launcher.
#
#   bash start.sh                                     the embedded data set: minutes, on any machine
#   bash start.sh @configs/vit_small_imagenet.args /data/imagenet
#                                 a recipe, its data, then any flags: on all GPUs of this machine
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node1 bash start.sh @configs/...
#                                 four machines: run this on each, with NODE_RANK 0, 1, 2 and 3
#   sbatch --nodes=4 --gpus-per-node=8 start.sh @configs/...
#                                 SLURM: the script starts itself on each node with srun
#   bash start.sh main_lincls.py /data/imagenet --pretrained FILE
#                                 evaluation, in the same ways
#   bash start.sh --dry-run ...   only print the commands
#
# It installs missing packages, checks the flags, and starts one process for each GPU (one process
# without a GPU). Variables of the environment:
#   NPROC_PER_NODE   processes on each machine
#   MASTER_PORT      port on MASTER_ADDR; default 29500, under SLURM derived from the job's number
#   MAX_RESTARTS     how often to restart after a process fails; default 0; needs --workdir
#   JOIN_SECONDS     how long machines wait for each other; default 600
# Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped by a signal after saving (--resume auto
# continues).
if [ -z "${BASH_VERSION:-}" ]; then # started as `sh start.sh`
  command -v bash >/dev/null ||
    { echo "start.sh: error: bash is needed and was not found" >&2; exit 2; }
  exec bash "$0" "$@"
fi
set -euo pipefail

fail() { echo "start.sh: error: $1" >&2; exit 2; }

self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do # started by a link; macOS has no `readlink -f`
  link=$(readlink "$self")
  case $link in /*) self=$link ;; *) self=$(dirname "$self")/$link ;; esac
done
# sbatch runs a copy of this file in another folder; the job was submitted from the repository
ROOT=$(cd "$(dirname "$self")" && pwd)
[ -e "$ROOT/main_snclr.py" ] || ROOT=${SLURM_SUBMIT_DIR:-$ROOT}
[ -e "$ROOT/main_snclr.py" ] ||
  fail "$ROOT is not the repository: submit the job from the repository's folder"
source "$ROOT/tools/environment.sh"

DRY_RUN=
script=main_snclr.py
options=snclr.options
flags=()
for flag in "$@"; do
  case $flag in
    --dry-run) DRY_RUN=1 ;;
    main_snclr.py) ;;
    main_lincls.py) script=$flag options=snclr.evaluation.options ;;
    *) flags+=("$flag") ;;
  esac
done
case " ${flags[*]-} " in
  *" -h "* | *" --help "*) PYTHONPATH=$ROOT exec python3 -m "$options" --help ;;
esac

run() { # run the last command of this script, or print it
  [ -z "$DRY_RUN" ] || { printf '%q ' "$@"; echo; exit; }
  exec "$@"
}

visible_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cv -e '^$' -e '^-1$' || true
  else
    nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
  fi
}

number() { # name, value: prints the number without leading zeros, which bash would read as octal
  [[ $2 =~ ^[0-9]+$ ]] || fail "$1 must be a whole number, found '$2'"
  [[ $2 =~ ^0*([0-9]{1,6})$ ]] || fail "$1 must be below 1000000, found $2"
  echo $((10#${BASH_REMATCH[1]}))
}

# srun sets SLURM_STEP_ID; sbatch and salloc do not, except that the shell of salloc can be an
# interactive step (use_interactive_step), with the number SLURM_INTERACTIVE_STEP of slurm.h
in_step=${SLURM_STEP_ID:-}
[ "$in_step" != 4294967290 ] || in_step=
slurm_nodes=${SLURM_JOB_NUM_NODES:-1}
[ -z "$in_step" ] || slurm_nodes=${SLURM_STEP_NUM_NODES:-1}
processes=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-$(visible_gpus)}}
nodes=$(number NNODES "${NNODES:-$slurm_nodes}")
processes=$(number NPROC_PER_NODE "$processes")
MAX_RESTARTS=$(number MAX_RESTARTS "${MAX_RESTARTS:-0}")
JOIN_SECONDS=$(number JOIN_SECONDS "${JOIN_SECONDS:-600}")
[ "$MAX_RESTARTS" -eq 0 ] || [[ " ${flags[*]-} " == *" --workdir"* ]] ||
  fail "MAX_RESTARTS needs --workdir"
[ "$nodes" -gt 0 ] || fail "NNODES must be at least 1, found $nodes"
processes=$((processes > 1 ? processes : 1))

find_python "$ROOT/requirements.txt"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# report a wrong flag once, before the start, rather than from every process
[ -n "$DRY_RUN" ] ||
  WORLD_SIZE=$((nodes * processes)) "$PYTHON" -m "$options" "${flags[@]+"${flags[@]}"}"

if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "$in_step" ]; then
  # one task on each node, with all its CPUs: since 22.05 srun ignores the job's --cpus-per-task
  run srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
    --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --kill-on-bad-exit=1 \
    bash "$ROOT/start.sh" "$script" "${flags[@]+"${flags[@]}"}"
fi

main=("$ROOT/$script" "${flags[@]+"${flags[@]}"}")
cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu) # Linux, macOS
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($cores / processes > 1 ? $cores / processes : 1))}
if [ "$nodes" -gt 1 ]; then
  node_rank=${NODE_RANK:-${SLURM_NODEID:-}}
  [ -n "$node_rank" ] ||
    fail "NNODES is $nodes, so NODE_RANK must be 0 .. $((nodes - 1)), different on each machine"
  node_rank=$(number NODE_RANK "$node_rank")
  [ "$node_rank" -lt "$nodes" ] ||
    fail "NODE_RANK must be 0 .. $((nodes - 1)) with NNODES=$nodes, found $node_rank"
  if [ -n "$in_step" ]; then
    hosts=$(scontrol show hostnames "$SLURM_STEP_NODELIST")
    MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
    MASTER_PORT=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))} # differs between jobs on a node
  fi
  [ -n "${MASTER_ADDR:-}" ] ||
    fail "NNODES is $nodes, so MASTER_ADDR must name the machine of NODE_RANK 0"
  port=$(number MASTER_PORT "${MASTER_PORT:-29500}")
  [ "$port" -gt 0 ] && [ "$port" -lt 65536 ] ||
    fail "MASTER_PORT must be 1 .. 65535, found $port"
  if [ "$node_rank" -eq 0 ] && [ -z "$DRY_RUN" ]; then
    "$PYTHON" "$ROOT/tools/torchrun.py" --port-is-free "$port" ||
      fail "port $port is in use: set MASTER_PORT to a free one"
  fi
  run "$PYTHON" "$ROOT/tools/torchrun.py" --nnodes "$nodes" --node_rank "$node_rank" \
    --nproc_per_node "$processes" --master_addr "$MASTER_ADDR" --master_port "$port" "${main[@]}"
elif [ "$processes" -gt 1 ] || [ "$MAX_RESTARTS" -gt 0 ]; then
  run "$PYTHON" "$ROOT/tools/torchrun.py" --standalone --nproc_per_node "$processes" "${main[@]}"
else
  run "$PYTHON" "${main[@]}"
fi
