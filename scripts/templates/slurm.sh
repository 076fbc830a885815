#!/bin/bash
#SBATCH --job-name=@name
#SBATCH --nodes=@nodes
#SBATCH --ntasks-per-node=@gpus
#SBATCH --gpus-per-node=@gpus
#SBATCH --cpus-per-task=@cpus
#SBATCH --time=@time
#SBATCH --signal=TERM@@120
#SBATCH --requeue
#SBATCH --open-mode=append
# One process per GPU; they find each other through SLURM. Two minutes before
# the time limit all of them get SIGTERM, save, and the job is queued again; so
# it is after a crash, and by SLURM itself after the death of a node. Processes
# that lost another one have a minute to end by themselves, so that the exit
# code is that of the first failure.
srun --kill-on-bad-exit=0 --wait=60 \
    @train
code=$?
case $code in
  @final) exit $code ;;
esac
if [ "${SLURM_RESTART_COUNT:-0}" -lt @max_restarts ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
