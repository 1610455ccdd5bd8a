#!/bin/bash
#SBATCH --job-name=pithtrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# sbatch job.sh CONFIG [--SECTION.KEY VALUE ...], in the repository's folder, on a file system that all nodes see.
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=1 .venv/bin/python -m pithtrain.cli train "$@"
