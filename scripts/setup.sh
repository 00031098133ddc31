# Sourced by the other scripts: makes .venv and installs mmprep into it.
#
#   source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
#   setup server        # or: setup server test
#
# Sets $root (the repository) and $venv, and changes to $root. A second call with nothing changed takes a moment: each
# extra leaves a stamp in .venv with the checksum of pyproject.toml it was installed from.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
cd "$root"

say() { printf '== %s\n' "$*" >&2; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Debian leaves the venv module out of its python3; where we may, we fetch it.
install_venv_module() {
    [[ -z "${PYTHON:-}" ]] && ((EUID == 0)) && command -v apt-get >/dev/null || return 0
    python3 -c 'import venv, ensurepip' 2>/dev/null && return 0
    say "installing python3 and python3-venv"
    apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-venv >&2
}

# Prints the interpreter to build the environment with, or says in one sentence what is missing.
find_python() {
    local python="${PYTHON:-python3}"
    command -v "$python" >/dev/null ||
        fail "$python is not installed; mmprep needs Python 3.11 or newer (on Debian: apt-get install python3 python3-venv)"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is $("$python" --version 2>&1), mmprep needs Python 3.11 or newer; name one with PYTHON=/path/to/python"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module; on Debian: apt-get install python3-venv"
    printf '%s\n' "$python"
}

# What an installed extra was installed from.
stamp() { sha256sum <pyproject.toml; }

# Whether .venv runs, has pip, and was made at this place: its commands hold its path.
usable() {
    [[ "$(cat "$venv/.made-at" 2>/dev/null)" == "$venv" ]] && "$venv/bin/python" -c "import pip" 2>/dev/null
}

# setup EXTRA...: an environment with mmprep and these extras, installed or already there.
setup() {
    local extra extras python current=yes
    exec {lock}<"$root/pyproject.toml"
    flock "$lock" # two scripts at once: the second waits and finds the work done
    for extra in "$@"; do
        [[ "$(cat "$venv/.installed-$extra" 2>/dev/null)" == "$(stamp)" ]] || current=no
    done
    if ! usable; then
        install_venv_module
        python="$(find_python)"
        say "making .venv with $("$python" --version)"
        "$python" -m venv --clear "$venv"
        printf '%s\n' "$venv" >"$venv/.made-at"
        current=no
    fi
    if [[ $current == no ]]; then
        rm -f "$venv"/.installed-*
        extras="$(IFS=,; printf '%s' "$*")"
        say "installing mmprep[$extras] (a first time takes a minute or two)"
        "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --editable ".[$extras]" >&2
        for extra in "$@"; do stamp >"$venv/.installed-$extra"; done
    fi
    exec {lock}>&-
}
