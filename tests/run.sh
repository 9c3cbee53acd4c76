#!/usr/bin/env bash
# Sets up what the tests need and runs all but the slow ones, those of the pages included.
# Arguments go to pytest instead: bash tests/run.sh -m slow, bash tests/run.sh tests/test_optim.py
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/tools/environment.sh"
cd "$ROOT"
# not wandb, which timm imports at each start of a program, nor MLflow and UMAP, which are large:
# their tests run where they are installed
find_python requirements.txt requirements/{datasets,hf,mat,onnx,parquet,torchcodec}.txt \
  tests/requirements.txt
# by itself pytest leaves out those of the pages; a file at a time goes to each of three processes,
# since many tests wait for programs; in the order of tests/conftest.py, the longest files first
[ $# -gt 0 ] || set -- -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pytest "$@"
