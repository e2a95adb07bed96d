# shellcheck shell=bash
# Sourced by benchmark_train_all.sh and benchmark_prefill_all.sh.

# measure_recipes OUT COMMAND [OPTION ...]
#
# Run `python -m COMMAND RECIPE OPTION ...` for each of `recipes`, and write the last line of its
# output to OUT/<recipe>.json. A result of the same command is kept; one of another command is an
# error, before anything runs. Returns 1 if a recipe failed.
measure_recipes() {
    local out=$1 command=$2 failed=0 recipe result twice
    shift 2
    mkdir -p "$out"
    twice=$(for recipe in "${recipes[@]}"; do basename "$recipe"; done | sort | uniq -d)
    if [[ -n $twice ]]; then
        echo "error: RECIPES has more than one $twice; measure them with different OUT" >&2
        exit 2
    fi
    for recipe in "${recipes[@]}"; do
        result=$out/$(basename "$recipe" .yaml)
        if [[ -e $result.json ]] && ! echo "$command $recipe $*" | cmp -s - "$result.command"; then
            echo "error: OUT=$out: $result.json is a result of another command; use another OUT" >&2
            exit 2
        fi
    done
    for recipe in "${recipes[@]}"; do
        result=$out/$(basename "$recipe" .yaml)
        if [[ -e $result.json ]]; then
            echo "$result.json exists"
            continue
        fi
        echo "$command $recipe $*" > "$result.command"
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
    return $failed
}
