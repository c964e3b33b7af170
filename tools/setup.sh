# Sourced by the other tools, with the extras they need as arguments: `source tools/setup.sh demo test`.
#
# Makes .venv in the checkout and installs the package there in editable form. An extra is installed again only when
# pyproject.toml has changed, or the checkout has moved, since its stamp was written. Puts .venv/bin first in PATH.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 </dev/null; }

_find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python; do
        if _new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    {
        echo "bottomless-wal needs Python 3.11 or newer; none was found (python3 here: $(python3 --version 2>&1 || true))."
        echo "Install one, or name it: PYTHON=/path/to/python3.11 $0"
    } >&2
    return 1
}

_setup() {
    local python extra stamp wanted=()
    if ! _new_enough .venv/bin/python; then
        python=$(_find_python) || return 1
        echo "making .venv with $("$python" --version)" >&2
        rm -rf .venv
        if ! "$python" -m venv .venv; then
            rm -rf .venv
            echo "$python could not make a virtual environment (on Debian and Ubuntu: install the package python3-venv)." >&2
            return 1
        fi
    fi
    stamp=$(pwd && cat pyproject.toml)
    for extra in "$@"; do
        if [ ! -f ".venv/.installed-$extra" ] || [ "$(cat ".venv/.installed-$extra")" != "$stamp" ]; then
            wanted+=("$extra")
        fi
    done
    if [ "${#wanted[@]}" -gt 0 ]; then
        local list
        list=$(IFS=, && echo "${wanted[*]}")
        echo "installing bottomless-wal[$list] into .venv" >&2
        .venv/bin/python -m pip install -qq --disable-pip-version-check --editable ".[$list]" </dev/null || return 1
        for extra in "${wanted[@]}"; do
            printf '%s\n' "$stamp" >".venv/.installed-$extra"
        done
    fi
}

_setup "$@" || exit 1
export PATH="$PWD/.venv/bin:$PATH"
