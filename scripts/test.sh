#!/usr/bin/env bash
# Runs the tests on this machine, from nothing but Python: most two at a time; then those that mostly wait,
# two at a time as well; then, one by one, those that watch the clock or start the program itself.
# Paths and other options of pytest: as pytest has them.
#
#     scripts/test.sh [--wide] [any option of pytest]
#
# --wide also runs more layouts of ranks and families than CI has time for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
install_into_venv dev
[ "$(id -u)" != 0 ] || scripts/install_browser.sh || true  # the tests say so where it is missing

narrow=" and not wide"
if [ "${1-}" = --wide ]; then
    narrow=
    shift
fi
for argument in "$@"; do
    case $argument in
        -n* | -m* | -k* | tests/*) exec "$python" -m pytest "$@" ;;
    esac
done
outcome=0
"$python" -m pytest -n 2 -m "not alone and not waiting$narrow" "$@" || outcome=$?
"$python" -m pytest -n 2 -m "waiting$narrow" "$@" || outcome=$?
"$python" -m pytest -m "alone$narrow" "$@" || outcome=$?
exit "$outcome"
