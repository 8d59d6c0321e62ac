#!/usr/bin/env bash
# Runs the tests on this machine, from nothing but Python.
#
#     scripts/test.sh [any option of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
install_into_venv dev
exec "$python" -m pytest "$@"
