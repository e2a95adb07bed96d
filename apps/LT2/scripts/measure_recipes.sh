# shellcheck shell=bash
# Sourced by benchmark_train_all.sh and benchmark_prefill_all.sh.

# measure_recipes OUT COMMAND [OPTION ...]
#
# Run `python -m COMMAND RECIPE OPTION ...` for each of `recipes`, and write the last line of its
# output to OUT/<recipe>.json. A result is kept, so that the same command resumes. Results of
# another command in OUT are an error, before anything runs. Sets `failed` to 1 if a recipe failed.
measure_recipes() {
    local out=$1 command=$2 recipe result twice
    shift 2
    mkdir -p "$out"
    twice=$(for recipe in "${recipes[@]}"; do basename "$recipe"; done | sort | uniq -d)
    if [[ -n $twice ]]; then
        echo "error: RECIPES has more than one $twice; measure them with different OUT" >&2
        exit 2
    fi
    for result in "$out"/*.json; do
        if [[ -e $result ]] && ! tail -n 1 "${result%.json}.command" 2>&1 | cmp -s - <(echo "$*"); then
            echo "error: OUT=$out: $result has other options; use another OUT" >&2
            exit 2
        fi
    done
    for recipe in "${recipes[@]}"; do
        result=$out/$(basename "$recipe" .yaml)
        if [[ -e $result.json && $(head -n 1 "$result.command") != "$recipe" ]]; then
            echo "error: OUT=$out: $result.json is not of $recipe; use another OUT" >&2
            exit 2
        fi
    done
    failed=0
    for recipe in "${recipes[@]}"; do
        result=$out/$(basename "$recipe" .yaml)
        if [[ -e $result.json ]]; then
            echo "$result.json exists"
            continue
        fi
        printf '%s\n' "$recipe" "$*" > "$result.command"
        # One process per recipe, so that a failure does not affect the others. tee /dev/stderr would
        # truncate a log file. Unquoted: a module and its option.
        # shellcheck disable=SC2086
        if python -m $command "$recipe" "$@" | tee >(cat >&2) | tail -n 1 > "$result.json.part"; then
            mv "$result.json.part" "$result.json"
        else
            rm "$result.json.part"
            echo "failed: $recipe" >&2
            failed=1
        fi
    done
}
