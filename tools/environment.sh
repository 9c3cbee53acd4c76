# Sourced by start.sh and tests/run.sh: sets PYTHON to an interpreter that satisfies the given
# requirement files. That is the active environment if it does, else .venv in the repository, which
# is created if needed.

satisfied() { # interpreter, requirement files
  "$1" - "${@:2}" 2>/dev/null <<'PY'
import sys
from importlib import metadata
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
for path in sys.argv[1:]:
    for line in open(path):
        line = line.split("#")[0].strip()
        if line:
            need = Requirement(line)
            try:
                if not need.specifier.contains(metadata.version(need.name), prereleases=True):
                    sys.exit(1)
            except metadata.PackageNotFoundError:
                sys.exit(1)
PY
}

find_python() { # requirement files
  PYTHON=python3
  command -v python3 >/dev/null || { echo "start: python3 is needed (3.10 or newer) and was not found" >&2; return 2; }
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "start: python3 is $(python3 -V 2>&1 | cut -d' ' -f2), 3.10 or newer is needed" >&2; return 2; }
  satisfied "$PYTHON" "$@" && return
  PYTHON=$ROOT/.venv/bin/python
  [ -x "$PYTHON" ] && satisfied "$PYTHON" "$@" && return
  local args=() file
  for file in "$@"; do args+=(-r "$file"); done
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' python3 -m venv "$ROOT/.venv"; echo
    printf '%q ' "$PYTHON" -m pip install "${args[@]}"; echo
    return
  fi
  echo "The active environment does not satisfy $*: installing into $ROOT/.venv (several GB with CUDA builds of torch)" >&2
  [ -x "$PYTHON" ] || python3 -m venv "$ROOT/.venv" || return 1
  "$PYTHON" -m pip install --quiet --disable-pip-version-check "${args[@]}" >&2
}
