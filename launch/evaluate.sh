#!/usr/bin/env bash
# How good a model is on benchmarks (one node; the engines run on it):
#   sbatch --gpus-per-node=8 launch/evaluate.sh runs/multi_teacher conf/eval/math.yaml conf/eval/code.yaml [key=value ...]
# A job that is stopped goes on with what it has when it is submitted again: docs/evaluation.md.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
exec .venv/bin/megatron-opd eval "$@"
