#!/usr/bin/env bash
# A large teacher, a small student:
#   sbatch --nodes=4 --gpus-per-node=8 launch/train_strong_to_weak.sh conf/strong_to_weak.yaml [key=value ...]
# Places, commands, waiting, tear-down, saving before the time limit: megatron_opd/train. `--dry-run` shows the plan.
#SBATCH --job-name=strong-to-weak
#SBATCH --nodes=4
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
exec .venv/bin/megatron-opd train "$@"
