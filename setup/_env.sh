# shellcheck shell=bash
# Shared by the scripts of this folder, which source it.
#
#   ROOT     the repository          VENV     its environment, default $ROOT/.venv
#   PYTHON   the Python for a new environment, if the caller sets it

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
VENV_PYTHON=$VENV/bin/python
CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu

export PIP_DISABLE_PIP_VERSION_CHECK=1
# Waiting torch threads sleep instead of spinning. On shared cores, spinning made CPU training more
# than 20 times slower; on an idle machine it gains little.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
unset PYTHONHOME # of another environment: it would load the wrong library

step() { printf '\n==> %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Fails if the Python is too old or has no venv module (a separate package in Debian).
is_usable_python() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        is_usable_python "$PYTHON" ||
            die "PYTHON=$PYTHON must be Python 3.11 or newer with the venv module"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.13 python3.11 python3.14 python; do
        if is_usable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer with the venv module found; install it (Debian, Ubuntu:" \
        "apt install python3 python3-venv) or give its path: PYTHON=/path/to/python3.12 bash $0"
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# Create $VENV unless it works already. An incomplete one is recreated.
make_venv() {
    if "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
        "$VENV_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            die "$VENV has $("$VENV_PYTHON" -V); remove it, LT2 needs Python 3.11 or newer"
        return
    fi
    if [[ -e $VENV && ! -e $VENV/pyvenv.cfg && -n $(ls -A "$VENV") ]]; then
        die "$VENV exists and is not a Python environment; move it away or set VENV"
    fi
    local python
    python=$(find_python) || exit 1
    step "Creating $VENV with $("$python" -V)"
    "$python" -m venv --clear "$VENV" || die "$python -m venv failed; see above"
}

# Run pip quietly; print its output if it fails.
quiet_pip() {
    local log=$VENV/pip.log
    if ! "$VENV_PYTHON" -m pip "$@" >"$log" 2>&1; then
        tail -n 25 "$log" >&2
        die "pip $1 failed; the full output is in $log"
    fi
}

# is_installed NAME==VERSION: succeeds if $VENV has it; 2.13.0+cpu counts as 2.13.0.
is_installed() {
    "$VENV_PYTHON" - "$1" <<'EOF' 2>/dev/null
import sys
from importlib.metadata import version
name, wanted = sys.argv[1].split("==")
sys.exit(version(name).partition("+")[0] != wanted)
EOF
}

# Print pip options for the index of CPU wheels, if it can be reached. Outside Linux, and with an
# index that serves CPU wheels, plain `pip install torch` is right.
cpu_index_options() {
    [[ $(uname -s) == Linux ]] || return 0
    "$VENV_PYTHON" - "$CPU_TORCH_INDEX" <<'EOF' >/dev/null 2>&1 || return 0
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5)
EOF
    printf '%s\n' --extra-index-url "$CPU_TORCH_INDEX"
}

# install_requirements FILE...: install these requirement files and this repository into $VENV.
# A stamp file records the inputs; nothing is installed until they change.
install_requirements() {
    local files="$*" stamp wanted file torch arguments=()
    for file in "$@"; do arguments+=(-r "$ROOT/$file"); done
    stamp=$VENV/.installed-${files//[^a-z]/-}
    wanted=$(cd "$ROOT" && {
        printf '%s\n' "$ROOT" "$files"
        cat pyproject.toml requirements*.txt
    } | "$VENV_PYTHON" -c 'import hashlib, sys
print(hashlib.sha256(sys.version.encode() + sys.stdin.buffer.read()).hexdigest())')
    [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]] || return 0

    torch=$(grep '^torch==' "$ROOT/requirements.txt")
    if ! has_gpu && ! is_installed "$torch"; then
        # First, so that packages which need torch find the CPU wheel.
        step "Installing $torch for the CPU: no GPU found (takes a minute or two)"
        # Not an array: bash before 4.4 (macOS, older clusters) treats an empty one as unset.
        # shellcheck disable=SC2046 # no option, or two words
        quiet_pip install -q $(cpu_index_options) "$torch"
    fi
    step "Installing $files"
    quiet_pip install -q "${arguments[@]}"
    step "Installing LT2 itself from $ROOT"
    quiet_pip install -q --no-deps -e "$ROOT"
    printf '%s\n' "$wanted" >"$stamp"
}
