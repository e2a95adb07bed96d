#!/usr/bin/env bash
#SBATCH --job-name=lt2_env
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=00:30:00
#SBATCH --output=create_env_%j.log
# Create the environment for training on GPUs: torch, kernels, evaluation harness, development tools.
#
#   bash setup/create_env.sh          or, on a cluster, from the repository:    sbatch setup/create_env.sh
#
# With conda it creates the conda environment lingua_<date>, otherwise the virtual environment .venv.
# ENV_NAME=... and VENV=... change these names, PYTHON=... sets the Python of a virtual environment.
set -euo pipefail

# sbatch runs a copy of this file from its spool folder, in the folder of submission.
setup=$(dirname "${BASH_SOURCE[0]}")
[[ -f $setup/_env.sh ]] || setup=${SLURM_SUBMIT_DIR:-.}/setup
if [[ ! -f $setup/_env.sh ]]; then
    echo "error: $setup/_env.sh is missing; submit this from the root of the repository" >&2
    exit 1
fi
# shellcheck source=setup/_env.sh
source "$setup/_env.sh"

conda=${CONDA_EXE:-$(type -P conda || true)} # in an interactive shell, conda is only a function
if [[ -n $conda ]]; then
    ENV_NAME=${ENV_NAME:-lingua_$(date +%y%m%d)}
    if ! "$conda" run --name "$ENV_NAME" python -m pip --version >/dev/null 2>&1; then
        step "Creating the conda environment $ENV_NAME"
        "$conda" create --yes --quiet --name "$ENV_NAME" python=3.12 pip
    fi
    VENV=$("$conda" run --name "$ENV_NAME" python -c 'import sys; print(sys.prefix)')
    VENV_PYTHON=$VENV/bin/python
    activation=$(printf 'conda activate %q' "$ENV_NAME")
else
    make_venv
    activation=$(printf 'source %q' "$VENV/bin/activate")
fi

# Always install for GPUs: a login or submission node often has none.
has_gpu() { true; }
install_requirements requirements-gpu.txt requirements-dev.txt
step "Installing the extras eval and wandb"
quiet_pip install -q -e "${ROOT}[eval,wandb]"

"$VENV_PYTHON" - <<'EOF'
import re
import sys
import torch, triton

version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))
print(f"\ntorch {torch.__version__} (CUDA {torch.version.cuda}), triton {triton.__version__}")
if version < (3, 7, 1):
    sys.exit("error: triton 3.7.1 or newer is needed: older ones compute a wrong GDN backward on Hopper")
EOF

step "Ready. Activate it with"
echo "$activation"
