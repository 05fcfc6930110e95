#!/usr/bin/env bash
# Run tools/train.py on GPUS processes of this machine: one for each GPU, or on the CPU where there is no GPU.
#
#   tools/dist_train.sh CONFIG GPUS [arguments of train.py]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 PORT=29500 tools/dist_train.sh ...   # on each machine, with its NODE_RANK
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: $0 CONFIG GPUS [arguments of train.py]" >&2; exit 2; }
CONFIG=$1 GPUS=$2
shift 2
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || { echo "error: GPUS must be a positive number, got '$GPUS'" >&2; exit 2; }
export NODE_RANK=${NODE_RANK:-0} PORT=${PORT:-29500}
PYTHON=${PYTHON:-python}
SCRIPT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/train.py

# one process looks for mistakes first, so that each ends in one line and not in a traceback per process
"$PYTHON" "$SCRIPT" "$CONFIG" "$@" --launcher pytorch --preflight "$GPUS"
exec "$PYTHON" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="$NODE_RANK" --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$PORT" \
    --nproc_per_node="$GPUS" "$SCRIPT" "$CONFIG" "$@" --launcher pytorch
