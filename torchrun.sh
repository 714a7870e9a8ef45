#!/usr/bin/env bash
# One launcher for every method:  ./torchrun.sh vader.py --base modelscope --weights W ...
# GPUs of this machine by default; NPROC=2 picks another number of processes. Several machines: the same line on
# each; they meet at HOST, the address of one of them (port 29400 unless given), in any order:
#   NODES=2 HOST=10.0.0.1 ./torchrun.sh t2v.py --base modelscope --weights W --data clips.csv --rank 0 --parallel fsdp
# Add --shard-group 8 to keep the shards of a network within each machine of 8 GPUs (docs/hardware.md).
# RESTARTS=3 starts all again when a process dies (give --resume as well: it goes on from the last checkpoint).
#
#   ./torchrun.sh t2v.py   --base modelscope --weights W --data clips.csv --rank 16 --lr 1e-4
#   ./torchrun.sh i2vgen.py --base i2vgen-xl --weights W --data clips.csv --lr 1e-4
#   ./torchrun.sh vader.py --base modelscope --weights W --prompts animals.txt --reward my_reward.py:fn
#   ./torchrun.sh videolcm.py --base modelscope --weights W --data clips.csv --parallel fsdp
#   ./torchrun.sh sample.py --ckpt out/vader --prompts prompts.txt --n 4
# (the -- below: torchrun would take our --n for the beginning of its own --nnodes)
set -euo pipefail
# a cluster's warning, too, is passed on to the processes: they save and leave
export TORCHELASTIC_SIGNALS_TO_HANDLE=${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
GPUS=$(nvidia-smi -L 2>/dev/null | wc -l || true)
NPROC=${NPROC:-$(( GPUS > 0 ? GPUS : 1 ))}
if [ "${NODES:-1}" -gt 1 ]; then
  exec torchrun --nproc_per_node="$NPROC" --nnodes="$NODES" --max_restarts="${RESTARTS:-0}" \
    --rdzv_backend=c10d --rdzv_id="${JOB:-nanovideo}" --rdzv_endpoint="${HOST:?give the address of one machine}" -- "$@"
fi
exec torchrun --standalone --nproc_per_node="$NPROC" --max_restarts="${RESTARTS:-0}" -- "$@"
