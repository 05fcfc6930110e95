#!/usr/bin/env bash
# Run tools/train.py on GPUS processes of this machine: one for each GPU, or on the CPU where there is no GPU.
#
#   tools/dist_train.sh CONFIG GPUS [arguments of train.py]
#   PORT=29501 tools/dist_train.sh ...     # default: a free port
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 PORT=29500 tools/dist_train.sh ...   # on each machine, with its NODE_RANK
set -euo pipefail
TOOLS=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # follows symbolic links
source "$TOOLS/dist_launch.sh"

[ $# -ge 2 ] || { echo "usage: $0 CONFIG GPUS [arguments of train.py]" >&2; exit 2; }
launch train.py "$2" "$1" "${@:3}"
