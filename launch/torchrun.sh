#!/usr/bin/env bash
# Start a training run with one process per GPU (or CPU rank).
#
#   launch/torchrun.sh NPROC [OVERRIDE...]                         one node
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500 \
#     launch/torchrun.sh NPROC [OVERRIDE...]                       on each node, with its own NODE_RANK
#
# NPROC: processes on this node. DRY_RUN=1 prints the command instead. Runs the python of $PYTHON, else of .venv, else
# the first on the PATH. JOIN_SECONDS (600): how long nodes wait for one another. STOP_SECONDS (600): how long the ranks
# may take to save after SIGTERM or SIGUSR1, before they are killed.
set -euo pipefail

fail() {
  echo "torchrun.sh: $1" >&2
  exit 2
}

is_number() { [[ $1 =~ ^(0|[1-9][0-9]*)$ ]]; }
is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

[[ $# -ge 1 ]] || fail "NPROC is missing: launch/torchrun.sh NPROC [OVERRIDE...]"
is_count "$1" || fail "NPROC must be a number of processes, not '$1'"
nproc=$1
shift

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -n ${PYTHON:-} ]]; then
  python=$PYTHON
elif [[ -x $root/.venv/bin/python ]]; then
  python=$root/.venv/bin/python
else
  python=$(command -v python3) || fail "no python3 on the PATH: set PYTHON, or run 'make setup'"
fi

for name in JOIN_SECONDS STOP_SECONDS; do
  is_count "${!name:-600}" || fail "$name must be a number of seconds, not '${!name}'"
done
rendezvous=(--standalone)
if [[ -n ${NNODES:-} ]]; then
  is_count "$NNODES" || fail "NNODES must be a number of nodes, not '$NNODES'"
fi
if [[ ${NNODES:-1} -gt 1 ]]; then
  for name in NODE_RANK MASTER_ADDR MASTER_PORT; do
    [[ -n ${!name:-} ]] || fail "$name is not set: with NNODES=$NNODES each node needs NODE_RANK, MASTER_ADDR and MASTER_PORT"
  done
  if ! is_number "$NODE_RANK" || [[ $NODE_RANK -ge $NNODES ]]; then
    fail "NODE_RANK must lie in 0..$((NNODES - 1)), not '$NODE_RANK'"
  fi
  if ! is_count "$MASTER_PORT" || [[ ${#MASTER_PORT} -gt 5 || $MASTER_PORT -gt 65535 ]]; then
    fail "MASTER_PORT must be a port number, not '$MASTER_PORT'"
  fi
  rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
  rendezvous+=(--rdzv-conf "timeout=${JOIN_SECONDS:-600}")
fi

command=("$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$nproc" -m megaopus train "$@")
if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
if [[ ${NNODES:-1} -gt 1 ]] && ! getent ahosts "$MASTER_ADDR" > /dev/null; then
  fail "MASTER_ADDR=$MASTER_ADDR does not resolve on $(hostname): name the first node as this one knows it"
fi
"$python" -c 'import megaopus' > /dev/null 2>&1 \
  || fail "$python cannot import megaopus here: set PYTHON to one that can (pip install .), or run 'make setup'"
# torchrun passes SIGTERM on by itself, but dies of SIGUSR1, and kills ranks that still save after 30 s.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
# It would take SIGHUP also where that is ignored, as under nohup.
[[ -n $(trap -p HUP) ]] || PET_SIGNALS_TO_HANDLE+=,SIGHUP
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_SECONDS:-600}
# Kernels start in the order in which they are asked for, so that tensor-parallel messages run beside what they are to.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Scoring and training ask for tensors of other sizes: segments that grow leave no holes between them.
[[ -n ${PYTORCH_CUDA_ALLOC_CONF:-} ]] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
exec "${command[@]}"
