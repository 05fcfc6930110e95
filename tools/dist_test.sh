#!/usr/bin/env bash
# Run tools/test.py on GPUS processes of this machine: one for each GPU, or on the CPU where there is no GPU.
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 PORT=29500 tools/dist_test.sh ...   # on each machine, with its NODE_RANK
set -euo pipefail

[ $# -ge 3 ] || { echo "usage: $0 CONFIG CHECKPOINT GPUS [arguments of test.py]" >&2; exit 2; }
CONFIG=$1 CHECKPOINT=$2 GPUS=$3
shift 3
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || { echo "error: GPUS must be a positive number, got '$GPUS'" >&2; exit 2; }
export NODE_RANK=${NODE_RANK:-0} PORT=${PORT:-29500}
PYTHON=${PYTHON:-python}
SCRIPT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/test.py

# one process looks for mistakes first, so that each ends in one line and not in a traceback per process
"$PYTHON" "$SCRIPT" "$CONFIG" "$CHECKPOINT" "$@" --launcher pytorch --preflight "$GPUS"
exec "$PYTHON" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="$NODE_RANK" --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$PORT" \
    --nproc_per_node="$GPUS" "$SCRIPT" "$CONFIG" "$CHECKPOINT" "$@" --launcher pytorch
