#!/usr/bin/env bash
# Sets up what the tests need and runs all but the slow ones, those of the pages included.
# Arguments go to pytest instead: bash tests/run.sh -m slow, bash tests/run.sh tests/test_optim.py
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/tools/environment.sh"
find_python "$ROOT"/{requirements.txt,requirements-mat.txt,requirements-hf.txt,tests/requirements.txt}
cd "$ROOT"
[ $# -gt 0 ] || set -- -m "not slow" # by itself pytest leaves out those of the pages
exec "$PYTHON" -m pytest "$@"
