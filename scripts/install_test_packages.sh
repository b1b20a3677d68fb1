#!/usr/bin/env bash
# Installs what some tests need beyond Python: Slurm (the jobs run on a real one) and shellcheck.
#
# Needs Debian or Ubuntu, and root; elsewhere those tests are skipped, and say so.
set -euo pipefail
PATH=$PATH:/usr/sbin
missing=()
command -v slurmctld >/dev/null && command -v slurmd >/dev/null || missing+=(slurm-wlm)
command -v munged >/dev/null || missing+=(munge)
command -v shellcheck >/dev/null || missing+=(shellcheck)
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed: ${missing[*]} (needs root on Debian or Ubuntu); the tests that use them are skipped" >&2
    exit 0
fi
echo "installing ${missing[*]} for tests"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
