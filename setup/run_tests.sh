#!/usr/bin/env bash
# Run lint, formatting, types and the whole CPU test suite.
#
#   bash setup/run_tests.sh [PYTEST ARGUMENT...]
#
# Creates .venv if missing. Tests marked gpu need CUDA.
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

# Pyright takes one core, so it runs beside pytest.
pyright_log=$(mktemp)
"$VENV_PYTHON" -m pyright --pythonpath "$VENV_PYTHON" >"$pyright_log" 2>&1 &
pyright=$!
trap 'kill "$pyright" 2>/dev/null || true; rm -f "$pyright_log"' EXIT

# Every check runs, even after a failure.
failed=()
check() {
    step "$1"
    "$VENV_PYTHON" -m "${@:2}" || failed+=("$1")
}

check "ruff check" ruff check
check "ruff format" ruff format --check

# One process per core, at most 4, as tests start processes too. With a GPU one process, so that
# tests don't compete for its memory. loadfile keeps the tests of a file together; tests/conftest.py
# orders the files, slow ones first.
workers=$("$VENV_PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')
if has_gpu; then workers=0; fi
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # tests start many processes that import the same modules
check "pytest" pytest -n "$workers" --dist loadfile --no-loadscope-reorder \
    --durations=15 "$@"

step "pyright"
wait "$pyright" || failed+=("pyright")
cat "$pyright_log"

if ((${#failed[@]})); then
    printf '\nfailed: %s\n' "${failed[@]}" >&2
    exit 1
fi
