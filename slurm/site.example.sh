# shellcheck shell=bash disable=SC2034
# What differs between sites. Copy it to slurm/site.sh, which is not in git, and keep what you need. Every job reads it as
# it starts, slurm/study.sh before it submits; for plain sbatch do
# `set -a; . slurm/site.sh; set +a` in the shell that submits, so that the first part takes effect.

# Read by sbatch in the shell that submits. Options on the command line win.
SBATCH_PARTITION=gpu
SBATCH_ACCOUNT=my-project
# SBATCH_QOS=preemptible

# On the login node the rest is not wanted.
[ -n "${SLURM_JOB_ID:-}" ] || return 0

# module load cuda/12.8
# STABLELM_PYTHON=/path/to/venv/bin/python     # default: the python on PATH as the job is submitted
# STABLELM_WRAP="apptainer exec --nv --bind /data /images/torch.sif"     # each command is started by it

# The interface between the nodes, as `ip -br address` names it, where a node has several.
# STABLELM_INTERFACE=ib0
# NCCL_IB_HCA=mlx5_0,mlx5_1

# How often a job may start before it gives up, and how long it waits after text became unavailable (doubles each time).
# STABLELM_MAX_ATTEMPTS=100 STABLELM_BACKOFF_SECONDS=120

# STABLELM_LAUNCHER=accelerate STABLELM_ACCELERATE="--config_file configs/accelerate/zero3.yaml"
