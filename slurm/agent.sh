#!/usr/bin/env bash
# One task a node: torchrun or accelerate launch, with a stop request passed on to its workers.
#
#   agent.sh PYTHON PROGRAM ARGUMENTS...
#
# Slurm signals a task's first process only. The launchers answer TERM by killing their workers after half a minute and
# know no other stop, so this script is the first process and hands TERM to the workers themselves, which save and end.
set -uo pipefail
python=$1
shift
everywhere=(--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
if [ "$STABLELM_LAUNCHER" = torchrun ]; then
    launcher=(torch.distributed.run --nnodes "$STABLELM_NODES" --node-rank "$SLURM_NODEID" --max-restarts 0
        --nproc-per-node "$STABLELM_PER_NODE" "${everywhere[@]}")
else
    mapfile -d '' -t flags <"${0%/*}/../accelerate" # of the snapshot, which this script is in
    launcher=(accelerate.commands.launch "${flags[@]}"
        --num_machines "$STABLELM_NODES" --num_processes $((STABLELM_NODES * STABLELM_PER_NODE))
        --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
fi

workers() { # children of the launcher that run our program
    local pid
    for pid in $(paste -d' ' /proc/"$agent"/task/*/children 2>/dev/null); do
        ! tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q '/launch/' || echo "$pid"
    done
}
stop() {
    local pids
    pids=$(workers)
    # shellcheck disable=SC2086
    kill -TERM ${pids:-$agent} 2>/dev/null
}
trap stop TERM USR1

read -ra wrap <<<"${STABLELM_WRAP:-}"
"${wrap[@]}" "$python" -m "${launcher[@]}" "$@" &
agent=$!
while :; do
    wait "$agent"
    rc=$?
    kill -0 "$agent" 2>/dev/null || exit "$rc"
done
