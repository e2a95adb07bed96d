#!/bin/bash
# Measure training steps of every 600M recipe on this machine, and report them:
#
#     bash apps/LT2/scripts/benchmark_train_all.sh [OPTION of benchmark_train, or key=value ...]
#
# The variables RECIPES and OUT override the defaults. Results of the same command are kept.

set -euo pipefail
cd "$(dirname "$0")/../../.."

# Unquoted, so that patterns expand and lists split at spaces.
recipes=(${RECIPES:-apps/LT2/configs/600M/*_600M.yaml})
out=${OUT:-runs/benchmark_train}

source apps/LT2/scripts/measure_recipes.sh
measure_recipes "$out" "apps.LT2.scripts.benchmark_train" "$@"
results=("$out"/*.json)
if [[ ! -e ${results[0]} ]]; then
    echo "error: no recipe could be measured" >&2
    exit 1
fi
python -m apps.LT2.scripts.benchmark_report "${results[@]}" --out "$out/benchmark_train.md"
exit $failed
