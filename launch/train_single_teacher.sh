#!/usr/bin/env bash
# One domain teacher, one student:
#   sbatch --nodes=3 --gpus-per-node=8 launch/train_single_teacher.sh conf/single_teacher.yaml [key=value ...]
# Places, commands, waiting, tear-down, saving before the time limit: megatron_opd/train. `--dry-run` shows the plan.
#SBATCH --job-name=single-teacher
#SBATCH --nodes=3
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
exec .venv/bin/megatron-opd train "$@"
