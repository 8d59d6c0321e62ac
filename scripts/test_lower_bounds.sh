#!/usr/bin/env bash
# Runs a part of the tests with the oldest versions that pyproject.toml allows, in an environment of its own.
#
#     scripts/test_lower_bounds.sh [FOLDER] [TESTS ...]
#
# FOLDER gets the environment; the default is a temporary one. torch is the version of constraints.txt
# unless TORCH names another (TORCH=2.10.0 downloads its build for CUDA, some gigabytes).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
folder=$(realpath -m "${1:-$(mktemp -d)}")
shift || true
tests=("$@")
[ $# -gt 0 ] || tests=(tests/cli/test_predict_verb.py tests/cli/test_fit_verb.py
    tests/cli/test_environment.py tests/test_module.py tests/jobs tests/data tests/transport
    tests/reports tests/placement tests/experts/test_backends.py tests/experts/test_packed.py)

"$(find_python)" -m venv "$folder/venv"
python=$folder/venv/bin/python
torch=${TORCH:-$(sed -n 's/^torch==//p' constraints.txt)}
# pip's resolver does not look for old versions, uv's does. What torch itself brings is left to torch.
"$python" -m pip install --quiet --disable-pip-version-check uv "torch==$torch"
uv=("$folder/venv/bin/uv" pip)
"${uv[@]}" compile --quiet --resolution lowest-direct --no-annotate --no-header \
    --python "$python" --constraint <(echo "torch==$torch") pyproject.toml |
    grep -vE '^(torch|triton|nvidia-.*|cuda-.*)==' >"$folder/lower.txt"
"${uv[@]}" install --quiet --python "$python" --no-deps --requirements "$folder/lower.txt" --editable .
"${uv[@]}" install --quiet --python "$python" --constraint "$folder/lower.txt" \
    pytest pytest-timeout pytest-xdist hypothesis
"$python" -m pip check

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
"$python" -m moe_lightning --env
outcome=0
for each in "${tests[@]}"; do  # one at a time: conftests of the same name would meet
    echo "== $each"
    "$python" -m pytest -m "not wide" "$each" || outcome=$?
done
exit "$outcome"
