#!/usr/bin/env bash
# Runs an experiment to its end on this machine: bash run_all.sh [PRESET or FILE.yaml] [options of isotone run]
# or submits it to a Slurm cluster:              bash run_all.sh [PRESET or FILE.yaml] --slurm [options of isotone submit]
#
# Makes .venv if there is none (see scripts/activate.sh), then takes the preset `pocket` unless another is named.
# Interrupted, the same command continues; the exit code is isotone's (75: stopped safely, run again).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/scripts/activate.sh"

case "${1:-}" in
-h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
esac
verb=run
for argument in "$@"; do # all but --slurm, in their order
    shift
    if [ "$argument" = --slurm ]; then verb=submit; else set -- "$@" "$argument"; fi
done
case "${1:-}" in
"" | -*) set -- pocket "$@" ;;
esac
ensure_venv pocket,gguf
exec "$VENV/bin/isotone" "$verb" "$@"
