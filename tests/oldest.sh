#!/usr/bin/env bash
# Runs the tests with the oldest versions that requirements.txt and requirements/ admit, in an
# environment of their own (several GB; made once). FOLDER=path says where; arguments go to pytest.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
FOLDER=${FOLDER:-$ROOT/.venv-oldest}
cd "$ROOT"
if [ ! -e "$FOLDER/made" ]; then
  python3 -m venv "$FOLDER"
  # the first minor versions: 2.6 is 2.6.x; not torchcodec, which needs a newer torch
  sed 's/>=\([0-9.]*\)/~=\1.0/' requirements.txt \
    requirements/{datasets,hf,mat,mlflow,onnx,parquet,umap,wandb}.txt > "$FOLDER/oldest.txt"
  "$FOLDER/bin/python" -m pip install --quiet -r "$FOLDER/oldest.txt" \
    -r tests/requirements.txt safetensors 'setuptools<81'
  # setuptools needs it to build the wheel; the oldest MLflow asks for less than 24, and runs with it
  "$FOLDER/bin/python" -m pip install --quiet 'packaging>=24.2'
  touch "$FOLDER/made"
fi
"$FOLDER/bin/python" -m pip list 2>/dev/null |
  grep -E '^(torch|torchvision|timm|numpy|tensorboard|tqdm|transformers|onnx|datasets|wandb) '
[ $# -gt 0 ] || set -- -m "not slow"
exec "$FOLDER/bin/python" -m pytest "$@"
