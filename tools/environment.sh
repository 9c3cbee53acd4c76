# Sourced by start.sh and tests/run.sh. find_python sets PYTHON to an interpreter whose packages
# satisfy the requirement files: that of the active environment if it does, else that of .venv in
# the repository, which is created if needed.

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
  command -v python3 >/dev/null ||
    { echo "start: python3 is needed (3.10 or newer) and was not found" >&2; return 2; }
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "start: python3 is $(python3 -V 2>&1 | cut -d' ' -f2), 3.10 or newer is needed" >&2
    return 2
  }
  satisfied "$PYTHON" "$@" && return
  PYTHON=$ROOT/.venv/bin/python
  UNFINISHED=$ROOT/.venv.unfinished
  [ -x "$PYTHON" ] && [ ! -e "$UNFINISHED" ] && satisfied "$PYTHON" "$@" && return
  local file
  REQUIREMENTS=()
  for file in "$@"; do REQUIREMENTS+=(-r "$file"); done
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' python3 -m venv "$ROOT/.venv"; echo
    printf '%q ' "$PYTHON" -m pip install "${REQUIREMENTS[@]}"; echo
    return
  fi
  make_environment "$@" 9>>"$UNFINISHED"
}

# The start that creates .venv locks the file UNFINISHED (a lock of the kernel, which ends with its
# processes), writes into it, and removes it at the end. A file with content that is not locked was
# left by a start that was killed.
make_environment() { # requirement files
  python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' || return 1
  satisfied "$PYTHON" "$@" && [ ! -s "$UNFINISHED" ] && { rm -f "$UNFINISHED"; return; }
  if [ -s "$UNFINISHED" ]; then
    echo "start: $ROOT/.venv was not finished by an earlier start: it is created again" >&2
    rm -rf "$ROOT/.venv"
  fi
  echo "$$" >"$UNFINISHED"
  echo "The active environment does not satisfy $*: installing into $ROOT/.venv" \
    "(several GB with CUDA builds of torch)" >&2
  local code=0
  [ -x "$PYTHON" ] || python3 -m venv "$ROOT/.venv" || code=1
  if [ "$code" -eq 0 ] && ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    echo "start: $ROOT/.venv has no pip: it is installed" >&2
    "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
      { echo "start: pip cannot be installed into $ROOT/.venv: remove that folder" >&2; code=1; }
  fi
  [ "$code" -ne 0 ] ||
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${REQUIREMENTS[@]}" >&2 || code=1
  rm -f "$UNFINISHED"
  return "$code"
}
