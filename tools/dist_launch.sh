# Shared by dist_train.sh and dist_test.sh, which `source` it and set TOOLS to its folder.

# launch SCRIPT GPUS [arguments of SCRIPT]: run SCRIPT in GPUS processes of this machine.
# NNODES, NODE_RANK, MASTER_ADDR and PORT are for training on several machines; PYTHON is the interpreter.
launch() {
    local script=$1 gpus=$2 nnodes=${NNODES:-1} rendezvous
    shift 2
    [[ $gpus =~ ^[1-9][0-9]*$ ]] || { echo "error: GPUS must be a positive number, got '$gpus'" >&2; exit 2; }
    [[ $nnodes =~ ^[1-9][0-9]*$ ]] || { echo "error: NNODES must be a positive number, got '$nnodes'" >&2; exit 2; }
    [[ ${NODE_RANK:-0} =~ ^[0-9]+$ ]] || { echo "error: NODE_RANK must be a number, got '$NODE_RANK'" >&2; exit 2; }
    script=$TOOLS/$script
    if [ "$nnodes" = 1 ] && [ -z "${PORT:-}" ]; then
        # a free port, so that several runs can share a machine; the default address is the host name, which may not
        # resolve
        rendezvous=(--standalone --nnodes=1 --local_addr=127.0.0.1)
    else
        export NODE_RANK=${NODE_RANK:-0} PORT=${PORT:-29500}
        rendezvous=(--nnodes="$nnodes" --node_rank="$NODE_RANK"
            --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$PORT")
    fi
    # one process runs all checks first, so that an error is one line instead of a traceback per process
    "${PYTHON:-python}" "$script" "$@" --launcher pytorch --preflight "$gpus"
    exec "${PYTHON:-python}" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node="$gpus" \
        "$script" "$@" --launcher pytorch
}
