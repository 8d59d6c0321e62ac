#!/usr/bin/env bash
# Answers the shipped prompts with the shipped checkpoint, on this machine, from nothing but Python.
#
#     scripts/demo.sh [--data.input FILE] [--model.checkpoint DIR] [any option of predict]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
install_into_venv ""

code=0
"$python" -m moe_lightning predict --config single_device.yaml "$@" || code=$?
# 3: done, but some rows are in errors.jsonl
if [ "$code" -eq 0 ] || [ "$code" -eq 3 ]; then
    "$python" scripts/show_predictions.py "$@"
fi
exit "$code"
