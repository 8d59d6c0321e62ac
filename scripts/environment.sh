# Sourced by demo.sh and test.sh: makes .venv at the root of the checkout, once, and sets $python.
# Nothing outside of the checkout is changed. Set PYTHON to choose the interpreter.

# install_into_venv EXTRA: installs this package with an extra ("" for none) and the tested versions.
install_into_venv() {
    local extra=$1 stamp=.venv/moe_lightning-installed wanted
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    python=$PWD/.venv/bin/python
    if [ -x "$python" ] && [ -f "$stamp" ]; then
        # An environment with the development tools can do all that one without them can.
        case "$(cat "$stamp")" in
            "$wanted $extra" | "$wanted dev") return ;;
        esac
    fi
    if [ ! -x "$python" ]; then
        local base
        base=$(find_python)
        echo "Making .venv with $base ..." >&2
        "$base" -m venv .venv || {
            rm -rf .venv
            echo "error: '$base -m venv' failed. On Debian and Ubuntu: apt install python3-venv" >&2
            return 2
        }
    fi
    # torch first: it is the large one, and the one whose build a user may have chosen.
    echo "Installing into .venv (some minutes the first time) ..." >&2
    "$python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
    "$python" -m pip install --quiet --disable-pip-version-check \
        -c constraints.txt -e ".${extra:+[$extra]}"
    echo "$wanted $extra" >"$stamp"
}

# find_python: prints the first interpreter that is new enough.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; '${PYTHON:-python3}' is" \
        "$("${PYTHON:-python3}" --version 2>/dev/null || echo "not installed")." \
        "Install a newer one, or name it: PYTHON=/path/to/python3.12 $0" >&2
    return 2
}
