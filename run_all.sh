#!/usr/bin/env bash
# Runs an experiment to its end on this machine: bash run_all.sh [PRESET or FILE.yaml] [options of isotone run]
#
# Makes .venv if there is none (see scripts/activate.sh), then runs the preset `pocket` unless another is named. Interrupted,
# the same command continues; the exit code is that of isotone run (75: stopped safely, run again).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/scripts/activate.sh"

case "${1:-}" in
-h | --help) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
esac
for argument in "$@"; do
    if [ "$argument" = --slurm ]; then
        fail "--slurm: this version does not submit to a cluster; put 'bash run_all.sh PRESET' into a job script"
    fi
done
ensure_venv pocket,gguf
case "${1:-}" in
"" | -*) exec "$VENV/bin/isotone" run pocket "$@" ;;
*) exec "$VENV/bin/isotone" run "$@" ;;
esac
