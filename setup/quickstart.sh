#!/usr/bin/env bash
# Train a small model and generate text from a clean clone, in under ten minutes on two CPU cores.
#
#   bash setup/quickstart.sh [OVERRIDE...]        for example: dump_dir=runs/q4 model.loop_count=4
#
# Creates .venv, installs, prepares a corpus from Python's standard library, trains
# apps/LT2/configs/600M/debug.yaml into runs/quickstart or the given dump_dir, generates text and
# plots the loss. The same command resumes an interrupted run. A finished run needs another dump_dir
# for other options. PYTHON=... sets the Python of a new .venv.
set -euo pipefail
# shellcheck source=setup/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"

RECIPE=apps/LT2/configs/600M/debug.yaml
DUMP_DIR=runs/quickstart
for option in "$@"; do
    [[ $option != dump_dir=* ]] || DUMP_DIR=${option#dump_dir=} # the last one wins
done
SECONDS=0 # bash counts them up

make_venv
if has_gpu; then
    install_requirements requirements-gpu.txt
else
    install_requirements requirements.txt
fi

step "Preparing data/local"
"$VENV_PYTHON" setup/prepare_local_data.py --out data/local

step "Training into $DUMP_DIR"
"$VENV_PYTHON" -m apps.LT2.train "config=$RECIPE" "$@" "dump_dir=$DUMP_DIR"

step "Generating text"
"$VENV_PYTHON" -m apps.LT2.generate "ckpt=$DUMP_DIR" max_gen_len=64 temperature=0.7 \
    'prompts=["The function returns"]'

step "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
"$VENV_PYTHON" -m apps.LT2.scripts.plot_loss "$DUMP_DIR"
"$VENV_PYTHON" setup/reference_values.py "$DUMP_DIR"
printf -v RUN %q "$DUMP_DIR"
cat <<EOF
The default options reach 2.45 to 2.51 in 200 steps (three seeds on a CPU).

metrics      $DUMP_DIR/metrics.jsonl
checkpoints  $DUMP_DIR/checkpoints

Try next, after \`source ${VENV#"$ROOT/"}/bin/activate\`:
# generate with 4 loops (the default is 2); without prompts= it asks for them
lt2 generate ckpt=$RUN loop_count=4 max_gen_len=64 temperature=0.7 prompts='["The function returns"]'
# the size and cost of the model with 4 loops
lt2 describe config=$RECIPE model.loop_count=4
# train with 1, 2 and 4 loops, in five to fifteen minutes
lt2 submit config=$RECIPE launcher=bash nodes=1 \\
    'sweep.model.loop_count=[1,2,4]' -- steps=100 dump_dir=runs/loops_sweep
# the validation loss against the number of loops, in runs/loops_sweep.png
lt2 plot runs/loops_sweep x=loop_count y=val_bpb out=runs/loops_sweep.png
# one loop against four on a task that needs them, three seeds: a table, a plot and a verdict
lt2 study permutation dump_dir=runs/permutation
EOF
