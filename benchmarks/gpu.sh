#!/usr/bin/env bash
# Everything that needs a GPU, on a bare machine with one: tests, tables of docs/PERFORMANCE.md,
# profiles. Prints Markdown, and leaves gpu.md and gpu.json in OUT (default: gpu-results).
#
#   bash benchmarks/gpu.sh               at most 8 minutes
#   bash benchmarks/gpu.sh --quick       at most 3 minutes
#   bash benchmarks/gpu.sh --dry-run     only list the parts and their time limits
#
# CIFAR=DIR and PHOTOS=DIR name folders with train/<class>/<image>; without them images are made.
# The parts are in order of importance. Each has a time limit, and one that fails stops no other.
# Exit status: 0; 1 if a part failed; 2 if there is no GPU.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-gpu-results}")
QUICK= DRY=
for flag in "$@"; do
  case $flag in
    --quick) QUICK=1 ;;
    --dry-run) DRY=1 ;;
    *) echo "gpu.sh: unknown flag $flag; known are --quick and --dry-run" >&2; exit 2 ;;
  esac
done
cd "$ROOT"
if [ -z "$DRY" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: torch finds no GPU on this machine" >&2
  exit 2
fi
DATA=(${CIFAR:+--cifar "$CIFAR"} ${PHOTOS:+--photos "$PHOTOS"})
FAILED=0

part() { # name, seconds, seconds with --quick (0: left out), command
  local name=$1 limit=$2 start=$SECONDS command status
  [ -z "$QUICK" ] || limit=$3
  shift 3
  [ "$limit" != 0 ] || return 0
  command=$(printf '%q ' "$@")
  if [ -n "$DRY" ]; then echo "$name, $limit s: $command"; return; fi
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.txt" 2>"$OUT/$name.err"
  status=$?
  [ $status = 0 ] || FAILED=1
  "$PYTHON" benchmarks/gpu_report.py "$OUT" "$name" "$status" $((SECONDS - start)) "$command" &&
    rm "$OUT/$name".{txt,err}  # they are in gpu.json
}

[ -n "$DRY" ] || { mkdir -p "$OUT"; rm -f "$OUT"/gpu.{md,json}; }
CODE=$(mktemp -d)  # compiled code, for all parts; not among the results
trap 'rm -rf "$CODE"' EXIT
export SNCLR_MARKDOWN=1 PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$CODE
R=(benchmarks/runs.py "${DATA[@]}" --rows)
# a capture that fails leaves the process unusable: these tests have one of their own
T=(-m pytest -m gpu -v --tb=short -p no:cacheprovider)
part tests 75 50 "$PYTHON" "${T[@]}" -k 'not replayed' tests/test_real_gpu.py
part replayed-tests 20 15 "$PYTHON" "${T[@]}" -k replayed tests/test_real_gpu.py
part objective 20 15 "$PYTHON" benchmarks/objective.py --steps 10
part kernels 30 25 "$PYTHON" benchmarks/kernels.py
part loop 60 55 "$PYTHON" benchmarks/loop.py
# the first run of a ViT compiles for a minute, so a shorter limit would leave it without figures;
# that of 4096 has other shapes, and compiles once more
part runs 170 0 "$PYTHON" "${R[@]}" vit vit-fused cifar embedded-graph cifar-eager cifar-256 \
  embedded cifar-256-eager vit-4096-fused vit-4096 vit-eager --limit 100 --total 160
part steps 25 0 "$PYTHON" benchmarks/step.py -b 128 --cifar-batch 512 --steps 10 \
  --only method optimiser
part micro-batch 25 0 "$PYTHON" benchmarks/micro_batch.py -b 2048 --micro-batch 1024 \
  --img-size 224 --undivided 512 --flags '--amp bf16' --peak-tflops 989 --steps 1
part attention 10 0 "$PYTHON" benchmarks/attention.py
part augmentation 10 0 "$PYTHON" benchmarks/augmentation.py
part search 10 0 "$PYTHON" benchmarks/search.py --steps 5
# needs lightly (benchmarks/requirements.txt) and CIFAR
[ -z "${CIFAR:-}" ] || part peers 25 0 "$PYTHON" benchmarks/peers.py "$CIFAR" -b 512 -j 12 \
  --turn 10 --steps 1
[ -n "$DRY" ] || echo "gpu.sh: $OUT/gpu.md and $OUT/gpu.json; $SECONDS s" >&2
exit $FAILED
