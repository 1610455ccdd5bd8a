#!/bin/bash
# Starts N ranks on this host with the variables that srun sets: rehearse.sh N CONFIG [--SECTION.KEY VALUE ...]
ranks=$1
shift
export SLURM_JOB_ID=$$ SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$ranks SLURM_STEP_NODELIST=localhost OMP_NUM_THREADS=1
pids=()
for ((rank = 0; rank < ranks; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank .venv/bin/python -m pithtrain.cli train "$@" &
    pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
[ $failed = 0 ] && echo "PASS: $ranks ranks trained" || echo "FAIL: a rank left with an error"
exit $failed
