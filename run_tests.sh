#!/usr/bin/env bash
# Runs the tests: bash run_tests.sh [quick|unit|integration|coverage|all] [options of pytest]
#
#   quick        ruff, then configuration, scripts, scoring, parametrizations and the graph; about a minute
#   unit         all but the tests that start or kill processes
#   integration  those; as root on Debian, Slurm is installed for them where it is missing
#   coverage     all tests, with the share of lines they reach
#   all          ruff, mypy, all tests: what CI runs (the default)
#
# Makes .venv if there is none (see scripts/activate.sh). TEST_WORKERS sets how many tests run side by side.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/scripts/activate.sh"

mode=${1:-all}
[ $# -gt 0 ] && shift
case "$mode" in
-h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
quick | unit | integration | coverage | all) ;;
*) echo "ERROR: unknown mode $mode; allowed: quick, unit, integration, coverage, all" >&2 && exit 2 ;;
esac
ensure_venv pocket,gguf,dev
case "$mode" in integration | coverage | all) bash "$ROOT/scripts/install_test_packages.sh" ;; esac
cd "$ROOT"
export OMP_NUM_THREADS=1
workers=${TEST_WORKERS:-$("$VENV/bin/python" -c 'import os; print(min(4, os.cpu_count() or 1))')}

run_pytest() {
    "$VENV/bin/python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
}

case "$mode" in
quick)
    "$VENV/bin/ruff" check
    run_pytest -m "not integration" tests/test_config.py tests/test_config_io.py tests/test_presets.py \
        tests/test_scripts.py tests/test_scoring.py tests/constraint/test_parametrization.py tests/pipeline "$@"
    ;;
unit) run_pytest -m "not integration" "$@" ;;
integration) run_pytest -m integration "$@" ;;
coverage)
    "$VENV/bin/coverage" run --source=src/isotone -m pytest "$@"
    "$VENV/bin/coverage" report --skip-covered
    ;;
all)
    "$VENV/bin/ruff" check
    "$VENV/bin/ruff" format --check
    "$VENV/bin/mypy"
    run_pytest --durations=50 --durations-min=5 "$@"
    ;;
esac
