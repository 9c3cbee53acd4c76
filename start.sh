#!/usr/bin/env bash
# The launcher.
#
#   bash start.sh                                                       the embedded data set, in minutes, on any machine
#   bash start.sh @configs/cifar10_resnet18.args /data/cifar            a recipe, its data, and any flag of main_snclr.py
#
# Sets up what it needs, checks the flags, and runs main_snclr.py on the hardware it finds: one process, or with
# several GPUs one process a GPU. NPROC_PER_NODE=n sets the number of processes.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$ROOT/tools/environment.sh"
find_python "$ROOT/requirements.txt"

processes=${NPROC_PER_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
case " $* " in *" -h "* | *" --help "*) exec "$PYTHON" "$ROOT/main_snclr.py" --help ;; esac
# a wrong flag is answered once and at once, not by every process
WORLD_SIZE=$((processes > 1 ? processes : 1)) "$PYTHON" -m snclr.options "$@"
if [ "$processes" -gt 1 ]; then
  exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$processes" "$ROOT/main_snclr.py" "$@"
fi
exec "$PYTHON" "$ROOT/main_snclr.py" "$@"
