#!/bin/bash
# Measure prefill and decode of every 1B recipe at every length on this machine, and report them:
#
#     bash apps/LT2/scripts/benchmark_prefill_all.sh [OPTION of apps.LT2.benchmark_prefill ...]
#
# The variables RECIPES, LENGTHS and OUT override the defaults. Existing results are kept.

set -euo pipefail
cd "$(dirname "$0")/../../.."

# Unquoted, so that patterns expand and lists split at spaces.
recipes=(${RECIPES:-apps/LT2/configs/1B/*_1B.yaml})
lengths=(${LENGTHS:-1024 2048 4096 8192 16384 32768 65536 131072})
out=${OUT:-runs/benchmark_prefill}

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
    if python -m apps.LT2.benchmark_prefill --config "$recipe" --seq-len "${lengths[@]}" "$@" \
        | tee >(cat >&2) | tail -n 1 > "$result.part"; then
        mv "$result.part" "$result"
    else
        echo "failed: $recipe" >&2
        failed=1
    fi
done
python -m apps.LT2.scripts.benchmark_report "$out"/*.json --out "$out/benchmark_prefill.md"
exit $failed
