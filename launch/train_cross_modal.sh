#!/usr/bin/env bash
# A multimodal student, teachers with and without images:
#   sbatch --nodes=4 --gpus-per-node=8 launch/train_cross_modal.sh conf/cross_modal.yaml [key=value ...]
# Places, commands, waiting, tear-down, saving before the time limit: megatron_opd/train. `--dry-run` shows the plan.
#SBATCH --job-name=cross-modal
#SBATCH --nodes=3
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
exec .venv/bin/megatron-opd train "$@"
