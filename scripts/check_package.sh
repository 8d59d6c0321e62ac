#!/usr/bin/env bash
# Builds the wheel and the sdist, checks them, installs the wheel into an environment that holds nothing
# else, and runs it there in an empty folder. Needs Python, and pip's index; some minutes.
#
#     scripts/check_package.sh [FOLDER]
#
# FOLDER gets dist/, the environment and what the runs write; the default is a temporary one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
checkout=$PWD
folder=$(realpath -m "${1:-$(mktemp -d)}")
base=$(find_python)
mkdir -p "$folder/here"

echo "== Build"
"$base" -m venv "$folder/tools"
"$folder/tools/bin/pip" install --quiet --disable-pip-version-check hatchling twine
rm -rf "$folder/dist"
"$folder/tools/bin/python" -W error -m hatchling build -d "$folder/dist"
"$folder/tools/bin/twine" check --strict "$folder"/dist/*

echo "== Install into an empty environment"
"$base" -m venv --clear "$folder/venv"
python=$folder/venv/bin/python
# torch first, as in demo.sh; nothing else is held to a version.
"$python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
"$python" -m pip install --quiet --disable-pip-version-check "$folder"/dist/*.whl
"$python" -m pip check

echo "== Run in an empty folder"
cd "$folder/here"
unset PYTHONPATH
where=$("$python" -c 'import moe_lightning; print(moe_lightning.__file__)')
case "$where" in "$checkout"/*) echo "error: $where is the checkout's" >&2 && exit 1 ;; esac
"$folder/venv/bin/moe-lightning" --version
"$python" -m moe_lightning --env
"$folder/venv/bin/moe-lightning" predict --config single_device.yaml
"$python" -m moe_lightning predict --config fsdp.yaml
"$python" -m moe_lightning fit --config finetune.yaml --trainer.max_steps 2 --trainer.val_check_interval 2
test "$(wc -l <outputs/single_device/predictions.jsonl)" = 60
cmp outputs/single_device/predictions.jsonl outputs/fsdp/predictions.jsonl
test "$(ls -A)" = outputs
echo "the package is fine: $folder"
