#!/usr/bin/env bash
# How often the student solves each prompt, before training (one node; the engines run on it):
#   sbatch --gpus-per-node=8 launch/difficulty.sh conf/multi_teacher.yaml [key=value ...]
# A job that is stopped goes on with what it has when it is submitted again: docs/difficulty.md.
#SBATCH --job-name=difficulty
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
exec .venv/bin/megatron-opd difficulty "$@"
