#!/usr/bin/env bash
# Trains on hosts that ssh reaches, one torchrun a host, and ends with the run's own exit code:
#
#   deploy/ssh.sh [--processes N] HOST[,HOST...] --config FILE [key.path=value ...]
#
# Every host has this repository under the same path, an environment with the same packages in it, and sees run.dir.
# N: ranks a host, by default one a GPU. TERM, INT and HUP stop the run with a checkpoint, and so does any other end of
# this script. Variables: STABLELM_PYTHON (default: .venv/bin/python here), STABLELM_MASTER (an address of the first
# host that the others reach; default: its name), STABLELM_SSH (ssh with its options). docs/outside_slurm.md says more.
set -uo pipefail

options=(--stop-with-stdin)
if [ "${1:-}" = --processes ]; then
    options+=(--processes "${2:-}")
    shift 2
fi
if [ $# -lt 2 ]; then
    echo "error: say where and what: deploy/ssh.sh [--processes N] HOST[,HOST...] --config FILE [key.path=value ...]" >&2
    exit 78
fi
IFS=, read -ra hosts <<<"$1"
shift
read -ra ssh <<<"${STABLELM_SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=15}"
folder=$(cd "$(dirname "$0")/.." && pwd)
# Another port in each attempt, below those that kernels hand out: the ranks of a lost host join no later attempt.
options+=(--nodes "${#hosts[@]}" --master "${STABLELM_MASTER:-${hosts[0]##*@}}:$((12000 + RANDOM % 16000))")

# The hosts' standard input, which ends when this script closes it or dies: ssh passes no signals on.
pipe=$(mktemp -d) && mkfifo "$pipe/stdin" || exit 74
exec 9<>"$pipe/stdin"
exec 8<"$pipe/stdin"
rm -r "$pipe"
stop() { exec 9>&-; }
trap stop TERM INT HUP

pids=()
for rank in "${!hosts[@]}"; do
    printf -v line '%q ' "${STABLELM_PYTHON:-$folder/.venv/bin/python}" launch/node.py --node-rank "$rank" \
        "${options[@]}" "$@"
    printf -v place '%q' "$folder"
    "${ssh[@]}" "${hosts[rank]}" "cd $place && exec $line" <&8 8<&- 9>&- &
    pids+=($!)
done
exec 8<&-

code=0
while [ ${#pids[@]} -gt 0 ]; do
    wait -n -p ended "${pids[@]}"
    rc=$?
    [ -n "${ended:-}" ] || continue # a signal, and no host, ended the wait
    for rank in "${!pids[@]}"; do
        [ "${pids[rank]}" = "$ended" ] || continue
        unset "pids[rank]"
        [ $rc -ne 255 ] || { echo "error: ssh to ${hosts[rank]} failed or was cut off" >&2 && rc=80; }
        # The first host to fail knows why; the others lose it.
        [ $rc -eq 0 ] || [ $code -ne 0 ] || { code=$rc && stop; }
    done
done
exit $code
