#!/usr/bin/env bash
# Sets up what the tests need and runs them; arguments go to pytest. Long ones: bash tests/run.sh -m slow
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/tools/environment.sh"
find_python "$ROOT"/{requirements.txt,requirements-mat.txt,requirements-hf.txt,tests/requirements.txt}
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
