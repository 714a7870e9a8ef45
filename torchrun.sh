#!/usr/bin/env bash
# One launcher for every method:  ./torchrun.sh vader.py --base modelscope --weights W ...
# GPUs of this machine by default; NPROC=2 picks another number of processes. Two machines (same line on both, NODE 0 and 1):
#   NODES=2 NODE=0 MASTER=10.0.0.1 ./torchrun.sh t2v.py --base modelscope --weights W --data clips.csv --rank 0 --parallel fsdp
#
#   ./torchrun.sh t2v.py   --base modelscope --weights W --data clips.csv --rank 16 --lr 1e-4
#   ./torchrun.sh i2vgen.py --base i2vgen-xl --weights W --data clips.csv --lr 1e-4
#   ./torchrun.sh vader.py --base modelscope --weights W --prompts animals.txt --reward my_reward.py:fn
#   ./torchrun.sh sample.py --ckpt out/vader --prompts prompts.txt --n 4
set -euo pipefail
GPUS=$(nvidia-smi -L 2>/dev/null | wc -l || true)
NPROC=${NPROC:-$(( GPUS > 0 ? GPUS : 1 ))}
if [ "${NODES:-1}" -gt 1 ]; then
  exec torchrun --nproc_per_node="$NPROC" --nnodes="$NODES" --node_rank="$NODE" --master_addr="$MASTER" --master_port="${PORT:-29500}" "$@"
fi
exec torchrun --standalone --nproc_per_node="$NPROC" "$@"
