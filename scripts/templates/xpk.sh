#!/bin/bash
# xpk restarts after exit codes 42 and 127 to 255 by itself; with these, after
# all but usage and data errors.
xpk workload create --workload=@name --cluster=@cluster --zone=@zone \
    --tpu-type=@accelerator --num-slices=@slices --docker-image=@image \
    --max-restarts=@max_restarts --restart-on-exit-codes=1,4-126 \
    --command=@quoted
