#!/usr/bin/env bash
# Lint, formatting, types and the whole CPU test suite.
#
#   bash setup/run_tests.sh [PYTEST ARGUMENT...]
#
# Makes .venv when it is missing. Tests marked gpu run where there is CUDA.
set -euo pipefail
# shellcheck source=setup/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"

make_venv
if has_gpu; then
    install_requirements requirements-gpu.txt requirements-dev.txt
else
    install_requirements requirements-dev.txt
fi

# Each check runs even when one before it failed: one run tells all there is to mend.
failed=()
check() {
    step "$1"
    "$VENV_PYTHON" -m "${@:2}" || failed+=("$1")
}

check "ruff check" ruff check
check "ruff format" ruff format --check
check "pyright" pyright --pythonpath "$VENV_PYTHON"

# One process a core, at most 4: a test may start processes of its own. With a GPU one process, so
# that tests do not compete for its memory. loadfile keeps the tests of a file together; files go in
# the order of tests/conftest.py, those that take long first.
workers=$("$VENV_PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')
if has_gpu; then workers=0; fi
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # tests start a hundred processes that import the same modules
check "pytest" pytest -n "$workers" --dist loadfile --no-loadscope-reorder \
    --durations=15 "$@"

if ((${#failed[@]})); then
    printf '\nfailed: %s\n' "${failed[@]}" >&2
    exit 1
fi
