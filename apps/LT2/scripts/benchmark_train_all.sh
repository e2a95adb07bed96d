#!/bin/bash
# Measure training steps of every 600M recipe on this machine, and report them:
#
#     bash apps/LT2/scripts/benchmark_train_all.sh [OPTION of benchmark_train, or key=value ...]
#
# The variables RECIPES and OUT override the defaults. Existing results are kept.

set -euo pipefail
cd "$(dirname "$0")/../../.."

# Unquoted, so that patterns expand and lists split at spaces.
recipes=(${RECIPES:-apps/LT2/configs/600M/*_600M.yaml})
out=${OUT:-runs/benchmark_train}

mkdir -p "$out"
failed=0
for recipe in "${recipes[@]}"; do
    result=$out/$(basename "$recipe" .yaml).json
    if [[ -e $result ]]; then
        echo "$result exists"
        continue
    fi
    # One process per recipe, so that a failure does not affect the others. tee /dev/stderr would
    # truncate a log file.
    if python -m apps.LT2.scripts.benchmark_train "$recipe" "$@" \
        | tee >(cat >&2) | tail -n 1 > "$result.part"; then
        mv "$result.part" "$result"
    else
        echo "failed: $recipe" >&2
        failed=1
    fi
done
python -m apps.LT2.scripts.benchmark_report "$out"/*.json --out "$out/benchmark_train.md"
exit $failed
