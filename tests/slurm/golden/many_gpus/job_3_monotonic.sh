#!/bin/bash
# Stage 3: makes the arm monotonic · experiment pythia-1.4b, seed 42
#
# Written by isotone submit, complete in itself. By hand:  sbatch /project/nlp/runs/pythia-1.4b/seed-42/jobs/job_3_monotonic.sh
# Edit it as you like and submit it by hand: isotone submit writes it anew, sbatch takes it as it stands.
#
# Near its time limit, or preempted, the job saves what it has and puts itself back into the queue under the same id, so
# that the jobs that depend on it go on waiting. What was done is never done again.
#
#SBATCH --job-name=pythia-1.4b-s42-3-train_monotonic
#SBATCH --output="/project/nlp/runs/pythia-1.4b/seed-42/logs/%x-%j.out"
#SBATCH --open-mode=append
#SBATCH --account=p12345
#SBATCH --partition=accelerated
#SBATCH --time=24:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --gres=gpu:4
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

banner() {
    echo "===== $SLURM_JOB_NAME, job $SLURM_JOB_ID, $(date '+%F %T'): $* ====="
}
fail() {
    echo "ERROR: $*"
    banner "FAILED: exit code 1"
    exit 1
}
SLURM_JOB_ID=${SLURM_JOB_ID:-none} SLURM_JOB_NAME=${SLURM_JOB_NAME:-pythia-1.4b-s42-3-train_monotonic}

# --- signals reach this shell and are passed on to the work -----------------------------------------------------------
child='' interrupted='' late='' signal=none
# shellcheck disable=SC2317 # called by the traps below
pass_on() {
    interrupted=yes signal=$1
    echo "got SIG$1"
    [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null
}
# shellcheck disable=SC2317 # the same
is_out_of_time() {
    scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -q 'Reason=TimeLimit'
}
trap 'pass_on USR1' USR1 # the limit is near (--signal)
trap 'pass_on TERM; is_out_of_time && late=yes' TERM # preempted, cancelled, or out of time
banner "starts on $(hostname), restart ${SLURM_RESTART_COUNT:-0}"

# --- environment: what you have set is respected ----------------------------------------------------------------------
export EXPERIMENT_SEED="${EXPERIMENT_SEED:-42}"
export PROJECT="${PROJECT:-/project/nlp}"
export SCRATCH="${SCRATCH:-$PROJECT}"
export HF_HOME="${HF_HOME:-$SCRATCH/huggingface}"
export HF_DATASETS_CACHE="${HF_DATASETS_CACHE:-$HF_HOME/datasets}"
export TRANSFORMERS_CACHE="${TRANSFORMERS_CACHE:-$HF_HOME/hub}"
export PYTHONHASHSEED="${PYTHONHASHSEED:-0}"                         # before Python starts
export CUBLAS_WORKSPACE_CONFIG="${CUBLAS_WORKSPACE_CONFIG:-:4096:8}" # before CUDA does
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then # srun does not take it over from sbatch
    export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
fi
PYTHON=/project/nlp/.venv/bin/python
RUNS=/project/nlp/runs

cd /project/nlp || fail "the folder /project/nlp cannot be entered on $(hostname)"
[ -d "$RUNS" ] || fail "$RUNS is not there on $(hostname): runs must lie on a file system that all nodes see"
[ -w "$RUNS" ] || fail "$RUNS cannot be written on $(hostname)"
"$PYTHON" -c 'import isotone' || fail "$PYTHON cannot import isotone on $(hostname): look at cluster.python and cluster.setup"

if command -v nvidia-smi >/dev/null && gpus=$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null); then
    echo "GPU (name, memory, driver): $gpus"
else
    echo "no GPU on $(hostname): running on the CPU ($(nproc) cores)"
fi

# --- the work, in a step of its own -----------------------------------------------------------------------------------
unstarted=$(mktemp) || unstarted='' # goes when the work begins: srun has codes of its own where it could not start it
# shellcheck disable=SC2016 # expanded by the step's shell
srun --kill-on-bad-exit=1 sh -c 'rm -f "$0"; exec "$@"' "$unstarted" "$PYTHON" -m isotone run /project/nlp/runs/pythia-1.4b/seed-42/jobs/experiment.yaml --out /project/nlp/runs --only train_monotonic --seed "$EXPERIMENT_SEED" &
child=$!
[ "$signal" = none ] || kill -s "$signal" "$child" # it came before the work had begun
while [ -z "$late" ]; do # a signal ends the wait, not the child
    interrupted=''
    wait "$child"
    code=$?
    [ -n "$interrupted" ] || break
done
[ -z "$late" ] || code=75 # the limit has come before the save had ended: the save before it counts

# --- what became of it: the records say whether the stage is complete, not the exit code ------------------------------
trap '' TERM USR1 # nothing may end the decision
begun=()
if [ -e "$unstarted" ]; then
    begun=(--not-begun)
    rm -f "$unstarted"
fi
"$PYTHON" -m isotone.slurm.outcome --run /project/nlp/runs/pythia-1.4b/"seed-$EXPERIMENT_SEED" --stage train_monotonic --max-requeues 50 --exit-code "$code" --signal "$signal" "${begun[@]}"
case $? in
0)
    banner COMPLETED
    exit 0
    ;;
75)
    banner "PARTIAL (will continue)"
    for pause in 5 10 20 40 60 0; do # slurmctld may be starting anew
        if scontrol requeue "$SLURM_JOB_ID"; then
            trap 'exit "$code"' TERM # Slurm's own; a shell that lingers could meet its next start on this node
            sleep 5 &
            wait $!
            exit "$code"
        fi
        sleep "$pause"
    done
    fail "the job could not be requeued; isotone submit continues it"
    ;;
76)
    banner "PARTIAL (Slurm has requeued the job)"
    exit 75
    ;;
esac
[ "$code" -ne 0 ] || code=1
if [ "$code" -eq 75 ]; then
    banner "PARTIAL (isotone submit continues it): exit code 75"
else
    banner "FAILED: exit code $code"
fi
exit "$code"
