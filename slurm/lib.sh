# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are for the scripts that read this file
# Parts of slurm/*.sh. Every function says what it sets; `code` is the folder whose launch/ and stablelm/ are run.

say() { echo "[$(date +%FT%T)] job $me: $*"; }
leave() { exit "$1"; }

# Array tasks: the last task's SLURM_JOB_ID is the id of the whole array, and requeueing that requeues every task.
me=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
me=${me:-${SLURM_JOB_ID:-}}
step='' stop_asked='' # the training step's srun, and whether a stop was asked for

patiently() { # CMD...: retries, so that a restarting controller or a slow client does not lose a job
    local try
    for try in 1 2 3 4 5 6 7 8 9 10 11 12; do
        "$@" && return 0
        sleep $((try < 6 ? try : 10))
    done
    return 1
}
field() { # NAME of `scontrol show job` -> its value
    patiently scontrol show job --oneliner "$me" 2>/dev/null | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1
}

# --- what differs between sites, and the submitter's python --------------------------------------------------------
load_site() { # sets python, and wrap: what starts it in a container
    set -a # what it sets is for the ranks' processes too
    # shellcheck source=/dev/null
    [ ! -f "$code/slurm/site.sh" ] || . "$code/slurm/site.sh"
    set +a
    read -ra wrap <<<"${STABLELM_WRAP:-}"
    python=${STABLELM_PYTHON:-$(command -v python || command -v python3 || true)}
    [ -n "$python" ] && return 0
    say "error: no python on PATH: activate the environment before sbatch, or set STABLELM_PYTHON in slurm/site.sh"
    leave 78
}
helper() { "${wrap[@]}" "$python" "$code/slurm/attempt.py" "$@"; }

choose_ranks() { # sets nodes, ranks, per_node, launcher, resources (options of srun)
    nodes=${SLURM_JOB_NUM_NODES:-1} launcher=${STABLELM_LAUNCHER:-srun} resources=()
    local gpus=${SLURM_GPUS_ON_NODE:-0} cpus=${SLURM_CPUS_PER_TASK:-}
    ranks=${SLURM_NTASKS:-}
    if [ -z "$ranks" ]; then # nobody asked for tasks: a rank a GPU, else a rank a node
        per_node=$((gpus > 0 ? gpus : 1)) ranks=$((nodes * (gpus > 0 ? gpus : 1)))
        cpus=${cpus:-$((${SLURM_CPUS_ON_NODE:-1} / per_node))}
        [ "$cpus" -gt 0 ] || { cpus=1; resources+=(--overcommit); }
    fi
    per_node=$((ranks / nodes))
    if [ "$launcher" = srun ]; then
        resources+=(--ntasks="$ranks")
        [ $((ranks % nodes)) -ne 0 ] || resources+=(--ntasks-per-node="$per_node")
        # srun does not take the job's own --cpus-per-task since Slurm 22.05.
        [ -z "$cpus" ] || resources+=(--cpus-per-task="$cpus")
        return 0
    fi
    [[ $launcher = torchrun || $launcher = accelerate ]] || {
        say "error: STABLELM_LAUNCHER=$launcher is none of srun, torchrun, accelerate"
        leave 78
    }
    [ $((ranks % nodes)) -eq 0 ] || {
        say "error: $launcher starts equally many ranks on every node, but $ranks tasks were asked for on $nodes nodes"
        leave 78
    }
    resources+=(--ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$((${cpus:-1} * per_node))")
}

# --- arguments and snapshot ----------------------------------------------------------------------------------------
read_arguments() { # CONFIG... key=value... or @FILE for an array; sets files, keys, run_dir
    local word words=("$@")
    files=() keys=()
    if [[ ${1:-} = @* ]]; then
        : "${SLURM_ARRAY_TASK_ID:?@FILE is for arrays: use slurm/study.sh FILE}"
        mapfile -d '' -t words < <(helper line "${1#@}" "$SLURM_ARRAY_TASK_ID")
    fi
    for word in "${words[@]}"; do
        if [[ $word = *=* ]]; then keys+=("$word"); else files+=("$word"); fi
    done
    if [ ${#files[@]} -eq 0 ]; then
        say "error: no configuration named: sbatch slurm/pretrain.sh CONFIG [key=value ...]"
        return 78
    fi
    run_dir=$(helper where "${files[@]}" "${keys[@]}") || {
        comment "not requeued, bad configuration or input (78): see the log"
        return 78
    }
}

take_snapshot() { # sets code to a copy of program, configuration files and arguments, kept in the run directory
    local copy=$run_dir/slurm/job-$SLURM_JOB_ID new number=0 file kept word arguments=() flags=()
    local program=(-- . ':(exclude)docs' ':(exclude)tests')
    new=$copy.new
    [ ! -L "$run_dir/slurm" ] || { say "error: $run_dir/slurm is a link, and is not followed: remove it"; return 78; }
    rm -rf "$new"
    if ! { mkdir -p "$new" && tar -C "$code" --exclude=slurm/.jobs --exclude=slurm/.runs -cf - stablelm launch slurm |
        tar -C "$new" -xf -; }; then
        say "error: $run_dir cannot be written"
        comment "not requeued, storage full or unwritable (74): $run_dir"
        return 74
    fi
    # The copy is not a checkout: the program's commit and its uncommitted changes are kept beside it.
    if [ -e "$code/.git" ] && git -C "$code" log -1 --format=%H "${program[@]}" >"$new/.commit" 2>/dev/null; then
        git -C "$code" diff HEAD --no-ext-diff --no-color "${program[@]}" >"$new/.commit.diff"
    else
        rm -f "$new/.commit"
    fi
    for file in "${files[@]}"; do
        keep "$file" || return 78
        arguments+=(--config "$kept")
    done
    printf '%s\0' "${arguments[@]}" "${keys[@]}" >"$new/arguments"
    for word in ${STABLELM_ACCELERATE:---config_file configs/accelerate/fsdp2.yaml}; do
        file=${word#--*=}
        [ ! -f "$file" ] || { keep "$file" && word=${word%"$file"}$kept; } || return 78
        flags+=("$word")
    done
    printf '%s\0' "${flags[@]}" >"$new/accelerate"
    echo "$run_dir" >"$new/run_dir"
    helper environment >"$new/environment.txt"
    # Once here, or every rank would compile it at its start.
    "${wrap[@]}" "$python" -m compileall -q "$new/stablelm" >/dev/null
    rm -rf "$copy"
    mv "$new" "$copy"
    # shellcheck disable=SC2154 # job_link is set by pretrain.sh, which needs it before it can read this file
    { mkdir -p slurm/.jobs && ln -sfn "$copy" "$job_link"; } ||
        say "warning: $PWD/slurm cannot be written: a requeued attempt will take the program as it is then"
    # So that slurm/evaluate.sh knows a run as its user's own.
    grep -Fqsx -- "$run_dir" slurm/.runs || echo "$run_dir" >>slurm/.runs || true
    code=$copy
}

keep() { # FILE: copies it into the snapshot that is being taken; sets kept to where it will lie
    number=$((number + 1)) kept=$copy/$number-${1##*/}
    cp "${1/#\~\//$HOME/}" "$new/${kept##*/}"
}

use_snapshot() { # sets run_dir, arguments; PYTHONPATH so that every process finds the copy first
    local now
    run_dir=$(<"$code/run_dir")
    mapfile -d '' -t arguments <"$code/arguments"
    export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
    [ -n "${SLURM_RESTART_COUNT:-}" ] || return 0
    now=$(helper environment | diff "$code/environment.txt" - | sed -n 's/^[<>] /&/p') || true
    [ -z "$now" ] || say "warning: the environment has changed since the first attempt (<: then, >: now)"$'\n'"$now"
}

# --- deadline, rendezvous, network -----------------------------------------------------------------------------------
set_deadline() { # exports SLURM_JOB_END_TIME, which Slurm sets by itself only in later releases
    local end
    end=$(field EndTime)
    [[ $end = *T* ]] && end=$(date -d "$end" +%s) && export SLURM_JOB_END_TIME=$end
}

set_rendezvous() { # exports MASTER_ADDR and MASTER_PORT
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Below the ports that kernels hand out; another one in each attempt, so that the ranks of a lost node join no later attempt.
    MASTER_PORT=$((12000 + (SLURM_JOB_ID * 13 + ${SLURM_RESTART_COUNT:-0}) % 16000))
    export MASTER_ADDR MASTER_PORT
}

set_network() { # what gloo, NCCL and torch read; whatever is set already wins
    # Hosts with several interfaces: gloo takes the one that the host's name resolves to, NCCL the first that it likes.
    if [ -n "${STABLELM_INTERFACE:-}" ]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$STABLELM_INTERFACE}
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$STABLELM_INTERFACE}
    fi
    # A collective that fails or hangs ends its process instead of waiting for ever in it.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    # The last collectives of every rank, written when one times out: they name the rank that did not come.
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$run_dir/stacks/nccl-rank-}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    # Warnings and errors alone: NCCL's information from a thousand ranks would hide the one useful line.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # Every rank would start a thread a core; a job without --cpus-per-task means one.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    # Output must reach the log when a process is killed; a crash in C gives a Python stack.
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    # Libraries' notes on future changes would be printed once a rank.
    export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
}

preflight() { # one task per node checks node, GPUs and network; sets unfit to the nodes with errors
    local found
    [ "${STABLELM_PREFLIGHT:-1}" != 0 ] || return 0
    found=$(srun --export=ALL --mpi=none --job-name=preflight --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
        "${wrap[@]}" "$python" "$code/slurm/preflight.py" "$run_dir" "$(date +%s)" 2>&1) && {
        [ -z "$found" ] || echo "$found"
        return 0
    }
    echo "$found"
    unfit=$(sed -n 's/^pre-flight: \([^:]*\): error: .*/\1/p' <<<"$found" | sort -u | paste -sd, -)
    return 1
}

# --- an attempt ------------------------------------------------------------------------------------------------------
begin_attempt() { # records the start; ends the job after too many attempts without a new commit
    local code_=0 words
    say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) of $ranks rank(s) on $SLURM_JOB_NODELIST ($launcher), run $run_dir"
    words=$(helper begin "$run_dir") || code_=$?
    [ "$code_" -ne 0 ] || { [ -z "$words" ] || say "$words"; return 0; }
    say "$words"
    comment "$words"
    finish_job "$code_"
}

listen() { # USR1 asks the ranks for a checkpoint; TERM is Slurm's own, which the ranks get from Slurm as well
    trap 'stop_ranks' USR1
    trap ':' TERM
}
stop_ranks() {
    [ -z "$stop_asked" ] || return 0
    stop_asked=1
    say "asked to stop: the ranks save and end"
    [ -z "$step" ] || signal_step
}
signal_step() { # TERM to the training step alone: srun itself would end the step at once
    local id
    for id in $(patiently squeue --noheader --steps --jobs="$me" --format='%i %j' | sed -n 's/ train$//p'); do
        patiently scancel --quiet --signal=TERM "$id"
    done
    # A hung rank must not keep the job beyond its limit, where Slurm would end it for good.
    local remaining=$((${SLURM_JOB_END_TIME:-0} - $(date +%s) - 15))
    [ "$remaining" -le 0 ] || (sleep "$remaining" && kill -TERM "$step") >/dev/null 2>&1 &
}

train() { # runs the ranks and waits; sets rc
    local command=("$code/launch/pretrain.py" "${arguments[@]}")
    rc=75
    [ -z "$stop_asked" ] || return 0
    if [ "$launcher" = srun ]; then
        command=("${wrap[@]}" "$python" "${command[@]}")
    else
        export STABLELM_NODES=$nodes STABLELM_PER_NODE=$per_node STABLELM_LAUNCHER=$launcher
        command=(bash "$code/slurm/agent.sh" "$python" "${command[@]}")
    fi
    srun --export=ALL --mpi=none --job-name=train --kill-on-bad-exit=1 "${resources[@]}" "${command[@]}" &
    step=$!
    await
    step=
}
await() { # a trapped signal cuts `wait` short
    while :; do
        wait "$step"
        rc=$?
        kill -0 "$step" 2>/dev/null || return 0
    done
}

# --- the end of an attempt -------------------------------------------------------------------------------------------
comment() { patiently scontrol update JobId="$me" Comment="$1" 2>/dev/null; }

settle() { # RC REASON: decides what follows the attempt, prints it and ends this script
    local state reason action wait_ words code_
    state=$(field JobState) reason=$(field Reason)
    IFS=$'\t' read -r code_ action wait_ words < <(helper end "$run_dir" --rc "$1" --reason "$2" --launcher "$launcher")
    helper report "$run_dir"
    if [ "${state:-RUNNING}" != RUNNING ] && [ "$reason" != TimeLimit ]; then
        say "Slurm ended this attempt (cancelled, or requeued by Slurm itself): nothing to decide"
        leave "${code_:-1}"
    fi
    say "$words"
    comment "$words"
    [ "$action" = requeue ] || finish_job "${code_:-1}"
    trap '' TERM
    patiently scontrol requeue "$me" || { say "error: scontrol requeue failed"; leave "$code_"; }
    # The nodes are free meanwhile: Slurm takes a start time for a job that is on its way back to the queue.
    [ "$wait_" -eq 0 ] || patiently scontrol update JobId="$me" StartTime="now+$wait_"
    leave "$code_"
}
finish_job() { # CODE
    rm -f "$job_link"
    leave "$1"
}

# --- evaluation ------------------------------------------------------------------------------------------------------
look=() # --own where the run is the caller's: options of `helper unevaluated`
evaluate_checkpoint() { # NAME CHECKPOINT [options of launch/eval.py]
    local name=$1 checkpoint=$2 out=$run_dir/evaluations/$1.json
    shift 2
    if [ -L "$run_dir/evaluations" ] || ! mkdir -p "$run_dir/evaluations" || ! rm -f "$out.new"; then
        say "error: $run_dir/evaluations is a link or cannot be written"
        return 1
    fi
    srun --export=ALL --mpi=none --job-name=evaluate --kill-on-bad-exit=1 "${resources[@]}" "${wrap[@]}" "$python" \
        "$code/launch/eval.py" --checkpoint "$checkpoint" --out "$out.new" "$@" </dev/null &
    step=$!
    await
    step=
    if [ "$rc" -eq 0 ] && mv "$out.new" "$out"; then return 0; fi
    [ -z "$stop_asked" ] || return 0
    # The run deletes superseded checkpoints whenever it commits one.
    helper unevaluated "$run_dir" "${look[@]}" | grep -q "^$name " || { say "$name was superseded meanwhile"; return 0; }
    say "warning: $name could not be evaluated ($rc)"
    echo "{\"checkpoint\": \"$name\", \"failed\": $rc}" >"$out"
    return 1
}
