# Sourced by the job scripts of this folder. `launch ARGUMENTS` runs `python ARGUMENTS` on every GPU
# of the job, and again when it fails; training goes on from its last checkpoint.
#
# LAUNCHER       torchrun (one per node, which starts the ranks) or srun (which starts them itself)
# MAX_RESTARTS   how often to start again within the job (3)
# GPUS_PER_NODE  ranks on a node (the job's GPUs, or 8)
# DRY_RUN        if not empty, print what would run on every rank and stop; works without Slurm,
#                where NODES (2) says on how many nodes
# shellcheck shell=bash

launcher=${LAUNCHER:-torchrun}
max_restarts=${MAX_RESTARTS:-3}
nodes=${SLURM_NNODES:-${NODES:-2}}
ranks_per_node=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
# Jobs that share a node must not share a port.
port=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-9500} % 20000))}

first_node() {
    local names
    if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        echo "${names%%$'\n'*}"
    else
        echo FIRST_NODE
    fi
}

node_command() {
    case $launcher in
    torchrun)
        # The agents of all nodes restart their ranks together.
        command=(srun --ntasks-per-node=1 --kill-on-bad-exit=1
            torchrun --nnodes "$nodes" --nproc-per-node "$ranks_per_node"
            --rdzv-backend c10d --rdzv-id "${SLURM_JOB_ID:-0}" --rdzv-endpoint "$MASTER_ADDR:$port"
            --max-restarts "$max_restarts" "$@")
        ;;
    srun)
        command=(srun --ntasks-per-node="$ranks_per_node" --kill-on-bad-exit=1
            bash examples/slurm/rank.sh "$@")
        ;;
    *)
        echo "LAUNCHER is $launcher; it takes torchrun or srun." >&2
        return 2
        ;;
    esac
}

quoted() {
    local words
    words=$(printf ' %q' "$@")
    echo "${words:1}"
}

print_commands() {
    local rank world=$((nodes * ranks_per_node))
    echo "once: $(quoted "${command[@]}")"
    [ "$launcher" = srun ] || echo "what that starts (torchrun itself numbers the nodes):"
    for ((rank = 0; rank < world; rank++)); do
        printf 'rank %d: RANK=%d LOCAL_RANK=%d WORLD_SIZE=%d LOCAL_WORLD_SIZE=%d' \
            "$rank" "$rank" $((rank % ranks_per_node)) "$world" "$ranks_per_node"
        printf ' MASTER_ADDR=%s MASTER_PORT=%d %s\n' "$MASTER_ADDR" "$port" \
            "$(quoted python -u "$@")"
    done
}

requeue() {
    echo "The job's time is nearly over; it goes back to the queue." >&2
    scontrol requeue "$SLURM_JOB_ID"
    # Slurm ends what runs.
    wait
    exit
}

launch() {
    local command=() attempt=0 status
    MASTER_ADDR=${MASTER_ADDR:-$(first_node)}
    MASTER_PORT=$port
    export MASTER_ADDR MASTER_PORT
    node_command "$@" || return
    if [ -n "${DRY_RUN:-}" ]; then
        print_commands "$@"
        return
    fi
    # Slurm sends it before the job's time is over (--signal); waiting lets the trap run at once.
    trap requeue USR1
    while true; do
        status=0
        "${command[@]}" &
        wait "$!" || status=$?
        if [ "$status" -eq 0 ] || [ "$attempt" -ge "$max_restarts" ]; then
            return "$status"
        fi
        attempt=$((attempt + 1))
        echo "Ended with status $status; restart $attempt of $max_restarts." >&2
    done
}
