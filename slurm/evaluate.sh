#!/usr/bin/env bash
#SBATCH --job-name=stablelm-evaluate
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
# Evaluates the checkpoints of a run as they are committed, beside the training, until the run has finished:
#
#   sbatch [its options] slurm/evaluate.sh RUN_DIR [options of launch/eval.py]
#
# Each checkpoint gets RUN_DIR/evaluations/step-XXXXXXXX.json; those that have one are left alone, so the job may be cut
# short and requeued, or submitted long after. A run that was started from this repository by slurm/pretrain.sh is
# evaluated on what its configuration says; any other may come from anybody (docs/security.md): text that is not a plain
# file of this machine, functions by import path and checkpoints outside RUN_DIR then need --data, --config or
# --trust-checkpoint. STABLELM_LOOK_SECONDS (60) lie between two looks for a new checkpoint.
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:?slurm/evaluate.sh is a batch script: sbatch slurm/evaluate.sh RUN_DIR}" || exit 78
code=$PWD
[ -f slurm/lib.sh ] || { echo "error: submit from the repository: $PWD has no slurm/lib.sh" >&2; exit 78; }
# shellcheck source=slurm/lib.sh
. slurm/lib.sh
[ $# -gt 0 ] || { echo "error: no run named: sbatch slurm/evaluate.sh RUN_DIR [options]" >&2; exit 78; }
run_dir=$1
shift
own=() # options for a run of its user's own, and the word that it is one
if grep -Fqsx -- "$(realpath -ms -- "$run_dir")" slurm/.runs; then own=(--config "$run_dir/config.yaml"); fi
case " $* " in *" --config"[\ =]* | *" --trust-checkpoint "*) look=(--own) ;; *) look=(${own:+--own}) ;; esac

# Nothing is lost by ending at once: an evaluation that was cut short is begun anew.
signal_step() { kill -TERM "$step"; }

listen
load_site
choose_ranks
set_rendezvous
set_network
say "evaluates the checkpoints of $run_dir on $ranks rank(s)"
failed=0
while :; do
    # The run's state is read before its checkpoints: what it committed last is then seen.
    state=$(helper state "$run_dir")
    while read -r name checkpoint; do
        [ -z "$stop_asked" ] || break
        evaluate_checkpoint "$name" "$checkpoint" "${own[@]}" "$@" || failed=$((failed + 1))
    done < <(helper unevaluated "$run_dir" "${look[@]}")
    if [ -n "$stop_asked" ]; then
        [ "${SLURM_RESTART_COUNT:-0}" -lt "${STABLELM_MAX_ATTEMPTS:-100}" ] || leave 75
        say "requeued: time is up"
        patiently scontrol requeue "$me"
        exit 75
    fi
    [ "$state" = going ] || break
    sleep "${STABLELM_LOOK_SECONDS:-60}" &
    step=$!
    await
    step=
done
say "the run $state; $failed checkpoint(s) could not be evaluated"
[ "$failed" -eq 0 ]
