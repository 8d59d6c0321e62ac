#!/usr/bin/env bash
# Runs the tests on this machine, from nothing but Python: first two at a time, then, one by one, those
# that watch the clock or start the program itself. Paths and other options of pytest: as pytest has them.
#
#     scripts/test.sh [any option of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
install_into_venv dev

for argument in "$@"; do
    case $argument in
        -n* | -m* | -k* | tests/*) exec "$python" -m pytest "$@" ;;
    esac
done
outcome=0
"$python" -m pytest -n 2 -m "not alone" "$@" || outcome=$?
"$python" -m pytest -m alone "$@" || outcome=$?
exit "$outcome"
