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

step "ruff"
"$VENV_PYTHON" -m ruff check
"$VENV_PYTHON" -m ruff format --check

step "pyright"
"$VENV_PYTHON" -m pyright --pythonpath "$VENV_PYTHON"

step "pytest"
# One process a core, at most 4: a test may start processes of its own. With a GPU one process, so
# that tests do not compete for its memory. loadfile keeps the tests of a file together.
workers=$("$VENV_PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')
if has_gpu; then workers=0; fi
export OMP_NUM_THREADS=1
exec "$VENV_PYTHON" -m pytest -n "$workers" --dist loadfile --durations=15 "$@"
