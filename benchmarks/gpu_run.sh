#!/usr/bin/env bash
# All GPU measurements, in stages of at most nine minutes:
#
#   benchmarks/gpu_run.sh OUT [STAGE]
#
# STAGE: 1 self-check and tests, 2 tuning, 3 benchmarks, 4 memory, 5 profile; without it, all incomplete stages run.
# Each writes JSON and text to OUT/check, OUT/tune, ...; the tables of all go to OUT/tables.md. A stage that runs out of
# time keeps its results: call it again to continue. The exit code is 1 if a stage is not complete, and the last line
# names the stage. Needs torch, Triton, timm, transformers and numpy, nothing of OpenMMLab. PYTHON names another
# interpreter; TINY=1 rehearses all stages without a GPU, in Triton's interpreter.
set -uo pipefail
[[ ${1:-} && ${2:-1} =~ ^[1-5]$ ]] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 2
STAGES=(check tune benchmark memory profile)
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TILES=$ROOT/swinv2_mm/ops/triton/tiles.json PYTHON=${PYTHON:-python} TINY=${TINY:-} DIR=$OUT/${IN_STAGE:-}
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=$OUT/cache/inductor TRITON_CACHE_DIR=$OUT/cache/triton

implementations=('ours triton eager' 'ours triton compiled' 'ours sdpa compiled' 'timm compiled' 'timm sdpa compiled')
backbones=(b_w24_384 b_w16_256 b_w8_256 l_w24_384 b_w32_1024 b_w32_800x1333 video_t_320x320x8)
attention=(g_block_1536_w32) profiled=(b_w24_384 b_w8_256) windows=(8 16 24) tune=(--minutes 60)
parts=(techniques --techniques none both sdpa 'sdpa + checkpointing' triton 'triton + checkpointing')
whole=(full --techniques 'triton + checkpointing' 'sdpa + checkpointing' triton sdpa)
if [[ $TINY ]]; then
    export TRITON_INTERPRET=1
    implementations=('ours triton eager' 'ours sdpa eager' 'timm sdpa eager')
    backbones=(nano) attention=(nano) profiled=(nano) windows=(8)
    tune=(--windows 4 --dtypes float32 --head-dim 16 --candidates 0)
    parts=(nano --techniques sdpa) whole=(nano --techniques sdpa)
fi

run() { # NAME COMMAND...: saves its output and its exit code
    "${@:2}" 2>&1 | tee -a "$DIR/$1.txt"
    echo "${PIPESTATUS[0]}" > "$DIR/$1.code"
}
tool() { run "$1" "$PYTHON" "$ROOT/benchmarks/$2.py" "${@:3}"; } # NAME TOOL ARGUMENTS...
compare() { # NAME TOOL SHAPES AND OPTIONS...
    tool "$1" "$2" --modes inference step --implementations "${implementations[@]}" --resume "$DIR" --shapes "${@:3}"
}

check() {
    run selfcheck "$PYTHON" -m swinv2_mm.ops.selfcheck --quick
    [[ ! $TINY ]] || return
    ! "$PYTHON" -c 'import pytest' || run tests env PYTHONPATH="$PYTHONPATH:$ROOT/tests/helpers" \
        "$PYTHON" -m pytest --noconftest -p no:cacheprovider -m 'not slow' "$ROOT/tests/test_ops/test_triton.py"
    run selfcheck_in_full "$PYTHON" -m swinv2_mm.ops.selfcheck --resume "$DIR/selfcheck.json"
}
tune() {
    [[ $TINY || -e $DIR/tiles.json || ! -e $TILES ]] || cp "$TILES" "$DIR"
    tool tune tune_kernels "${tune[@]}" --out "$DIR/tiles.json" --times "$DIR/times.json"
}
benchmark() {
    tool operator benchmark_operator --windows "${windows[@]}" --json "$DIR/operator.json"
    compare backbone benchmark_backbone "${backbones[@]}"
    compare attention benchmark_attention "${attention[@]}"
}
memory() {
    tool parts benchmark_memory --task "${parts[@]}" --json "$DIR/memory.json" --resume --repeats 1
    tool whole benchmark_memory --task "${whole[@]}" --json "$DIR/memory.json" --resume --repeats 1
}
profile() {
    compare profile benchmark_backbone "${profiled[@]}" --profile --repeats 3
    command -v ncu || return
    kernels=$("$PYTHON" -c 'from swinv2_mm.ops.triton import tiles; print("|".join(tiles.KERNELS))')
    run ncu ncu --clock-control none --set full --kernel-id "::regex:^($kernels)\$:1" \
        "$PYTHON" "$ROOT/benchmarks/benchmark_operator.py" --windows 24
}
[[ ! ${IN_STAGE:-} ]] || { "$IN_STAGE"; exit "$(cat "$DIR"/*.code | sort -n | tail -1)"; }

incomplete=()
for number in ${2:-1 2 3 4 5}; do
    stage=${STAGES[number - 1]} DIR=$OUT/${STAGES[number - 1]}
    [[ ${2:-} || ! -e $DIR/complete ]] || continue
    mkdir -p "$DIR" && rm -f "$DIR/complete"
    "$PYTHON" "$ROOT/benchmarks/gpu_tables.py" --versions | tee "$DIR/versions.txt"
    [[ $TINY || ! -e $OUT/tune/tiles.json ]] || cp "$OUT/tune/tiles.json" "$TILES"
    IN_STAGE=$stage timeout --kill-after=10 540 "$BASH" "$0" "$OUT"
    case $? in
        0) touch "$DIR/complete" ;;
        124 | 137) incomplete+=("$stage (out of time: call it again to continue)") ;;
        *) incomplete+=("$stage (failed: see $DIR/*.code and *.txt)") ;;
    esac
done
"$PYTHON" "$ROOT/benchmarks/gpu_tables.py" "$OUT" > "$OUT/tables.md" && echo "tables: $OUT/tables.md" ||
    incomplete+=(tables)
[[ ! ${incomplete[*]} ]] || { printf -v list ', %s' "${incomplete[@]}"; echo "not complete: ${list:2}"; exit 1; }
