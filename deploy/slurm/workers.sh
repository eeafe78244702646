#!/bin/sh
# Sixteen workers with a GPU each, for a day: sbatch deploy/slurm/workers.sh
# Redis and PostgreSQL run elsewhere. ~/.config/earmark.env (mode 600) sets EARMARK_BROKER__URL and
# EARMARK_DATABASE__URL.
#SBATCH --job-name=earmark
#SBATCH --array=1-16
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=24:00:00
# Send SIGTERM a minute before the time limit: the worker drains.
#SBATCH --signal=TERM@60
#SBATCH --requeue
set -eu
set -a
. "${EARMARK_ENV:-$HOME/.config/earmark.env}"
set +a
export HF_HOME="${HF_HOME:-${SCRATCH:-$HOME}/models}"
# Restart a worker that dies, but not after exit code 3: a setting is wrong.
until srun earmark worker --log-json; do
    [ $? -ne 3 ] || exit 3
    sleep 5
done
