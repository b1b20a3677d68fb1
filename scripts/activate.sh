# Sourced by run_all.sh and run_tests.sh: makes the virtual environment once and keeps its packages as constraints.txt says.
#
#   PYTHON        the interpreter that makes it (default: python3, or python3.11 and newer where that is too old)
#   ISOTONE_VENV  where it lies (default: .venv beside this repository's run_all.sh)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${ISOTONE_VENV:-$ROOT/.venv}

fail() {
    echo "ERROR: $*" >&2
    exit 1
}

# Print the interpreter to use, or end with an ERROR line.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a command"
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON is older than Python 3.11 (or does not start)"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer was found; install one, or name it: PYTHON=/path/to/python3 bash $0"
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Make sure that the environment holds isotone with the given extras; quick where nothing has changed.
ensure_venv() {
    local extras=$1 stamp python wanted
    wanted=$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)" $ROOT"
    for stamp in "$VENV/.isotone-$extras"*; do # an environment with more extras will do
        if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
            return
        fi
    done
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || exit 1
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "$python cannot make virtual environments; install its venv package (Debian, Ubuntu: python3-venv)"
        echo "making $VENV with $("$python" --version)"
        "$python" -m venv --clear "$VENV" || fail "$VENV could not be made"
    fi
    echo "installing isotone[$extras] into $VENV (once; some minutes)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$ROOT/constraints.txt" --editable "$ROOT[$extras]" ||
        fail "the installation failed (see above); the package index must be reachable. Run the same command again"
    echo "$wanted" >"$VENV/.isotone-$extras"
}
