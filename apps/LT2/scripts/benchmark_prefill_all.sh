#!/bin/bash
# Measure prefill and decode of every 1B recipe at every length on this machine, and report them:
#
#     bash apps/LT2/scripts/benchmark_prefill_all.sh [OPTION of apps.LT2.benchmark_prefill ...]
#
# The variables RECIPES, LENGTHS and OUT override the defaults. Results of the same command are kept.

set -euo pipefail
cd "$(dirname "$0")/../../.."

# Unquoted, so that patterns expand and lists split at spaces.
recipes=(${RECIPES:-apps/LT2/configs/1B/*_1B.yaml})
lengths=(${LENGTHS:-1024 2048 4096 8192 16384 32768 65536 131072})
out=${OUT:-runs/benchmark_prefill}

source apps/LT2/scripts/measure_recipes.sh
measure_recipes "$out" "apps.LT2.benchmark_prefill --config" --seq-len "${lengths[@]}" "$@"
results=("$out"/*.json)
if [[ ! -e ${results[0]} ]]; then
    echo "error: no recipe could be measured" >&2
    exit 1
fi
python -m apps.LT2.scripts.benchmark_report "${results[@]}" --out "$out/benchmark_prefill.md"
exit $failed
