#!/usr/bin/env bash
# Submits one array job over the runs listed in FILE, one `CONFIG [CONFIG ...] key=value ...` a line:
#
#   slurm/study.sh FILE [sbatch options]
#   STABLELM_AT_ONCE=8 slurm/study.sh runs.txt --gpus-per-node=1 --time=12:00:00
#
# The number of a line is the number of its array task. Finished runs are skipped, so the same command after a failure
# submits the rest. Every line needs a run.dir of its own. At most STABLELM_AT_ONCE (4) of them run at a time. Prints the
# array's job id. Lines may quote as a shell does; empty ones and those that begin with # are not runs.
set -euo pipefail

[ -f "${1:-}" ] || { echo "error: name a file with a run a line: slurm/study.sh FILE [sbatch options]" >&2; exit 78; }
[ -f slurm/lib.sh ] || { echo "error: start it in the repository: $PWD has no slurm/lib.sh" >&2; exit 78; }
code=$PWD
# shellcheck source=slurm/lib.sh
. slurm/lib.sh
load_site
left=$(helper unfinished "$1")
[ -n "$left" ] || { echo "nothing to do: every run of $1 has finished" >&2; exit 0; }

# Tasks start when others end, perhaps days from now: they read this copy, named by its content.
copy=$(dirname "$1")/.${1##*/}.$(cksum <"$1" | cut -d ' ' -f 1)
cp "$1" "$copy"
exec sbatch --parsable --job-name="$(basename "$1" .txt)" --output=%x-%A_%a.out \
    --array="$left%${STABLELM_AT_ONCE:-4}" "${@:2}" slurm/pretrain.sh "@$copy"
