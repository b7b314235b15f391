#!/usr/bin/env bash
#SBATCH --job-name=stablelm
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
# Trains under Slurm until the last step, however often the job is cut short:
#
#   sbatch [its options] slurm/pretrain.sh CONFIG [CONFIG ...] [key=value ...]
#   sbatch -N 4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 --time=24:00:00 slurm/pretrain.sh FILE run.dir=DIR
#
# Submit from the repository, with the environment whose python is to be used. Nodes, tasks, GPUs, time, partition and
# account are sbatch's options, or SBATCH_* variables that slurm/site.sh sets. One srun task is one rank;
# STABLELM_LAUNCHER=torchrun or accelerate starts one launcher a node instead. docs/slurm.md describes the rest.
#
# USR1 comes to this script (B:) a minute before the time limit and from a site's preemption; sent by hand
# (scancel --batch --signal=USR1 JOB) it stops with a checkpoint and requeues. The ranks know the time limit too and stop
# earlier by themselves where saving takes longer than that.
set -uo pipefail

cd "${SLURM_SUBMIT_DIR:?slurm/pretrain.sh is a batch script: sbatch slurm/pretrain.sh CONFIG [key=value ...]}" || exit 78
[ -f slurm/lib.sh ] || { echo "error: submit from the repository: $PWD has no slurm/lib.sh" >&2; exit 78; }
code=$PWD
# Slurm keeps a copy of this script; what it calls is kept in the snapshot of the job's first start.
# Clusters that share a home directory give the same job numbers.
job_link=slurm/.jobs/${SLURM_CLUSTER_NAME:-cluster}-$SLURM_JOB_ID
[ -z "${SLURM_RESTART_COUNT:-}" ] || code=$(readlink "$job_link" || echo "$PWD")
# shellcheck source=slurm/lib.sh
. "$code/slurm/lib.sh"

listen
load_site
choose_ranks
if [ "$code" = "$PWD" ]; then
    read_arguments "$@" || leave $?
    take_snapshot || leave $?
fi
use_snapshot
begin_attempt
set_deadline
set_rendezvous
set_network
if ! preflight; then
    settle 80 "pre-flight check failed on ${unfit:-a node}"
fi
train
settle "${rc:?}" ""
