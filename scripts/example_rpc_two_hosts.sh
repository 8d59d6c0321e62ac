#!/usr/bin/env bash
# Predicts with the experts on another machine; this one is the master. As it is, the worker runs
# here as well.
#
#     scripts/example_rpc_two_hosts.sh
#     WORKER_HOST=me@gpu2 WORKER_ADDRESS=tcp://192.0.2.11:7000 CHECKPOINT=DIR \
#         scripts/example_rpc_two_hosts.sh --data.input prompts.jsonl
#
# The other machine needs this package, its own copy of the checkpoint under the same name, and two
# ports that this machine can reach: that of WORKER_ADDRESS and the next. Options are those of predict.
set -euo pipefail
host=${WORKER_HOST:-} # as ssh knows it
address=${WORKER_ADDRESS:-tcp://127.0.0.1:7000}
checkpoint=${CHECKPOINT:-demo}
python=${PYTHON:-python}
keys=${KEYS:-moe-rpc-keys}

# Once: a pair of keys for masters and one for workers. Whoever has none is not heard.
[ -d "$keys" ] || "$python" -m moe_lightning worker --new-keys "$keys" > /dev/null

serve=("$python" -m moe_lightning worker --listen "$address" --model.checkpoint "$checkpoint" --keys)
if [ -z "$host" ]; then
    "${serve[@]}" "$keys" &
else
    scp -rpq "$keys" "$host:"
    ssh -tt "$host" "$(printf '%q ' "${serve[@]}" "$(basename "$keys")")" < /dev/null &
fi
# A worker serves one master after the other; this one ends with the script.
trap 'kill $! 2> /dev/null || true; wait || true' EXIT

# The master waits until the worker listens.
"$python" -m moe_lightning predict --config rpc.yaml --model.checkpoint "$checkpoint" \
    --trainer.strategy.keys "$keys" --trainer.strategy.workers "[$address]" \
    --output_dir outputs/two_hosts "$@"
