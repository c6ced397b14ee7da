# Sourced by the scripts beside it: `use_environment EXTRAS` makes a virtual environment with the project and the
# named extras, or reuses the one that is there, and puts it on PATH. MASS_VENV moves it, PYTHON chooses python.

use_environment() {
    local extras=$1 venv=${MASS_VENV:-.venv} python=${PYTHON:-python3} wanted stamp
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "Error: $python is missing or older than 3.11; set PYTHON to a newer one." >&2
        return 1
    fi
    if [[ ! -x $venv/bin/python ]]; then
        echo "Creating $venv" >&2
        "$python" -m venv "$venv"
    fi
    wanted=$(cat pyproject.toml scripts/requirements-torch.txt | sha256sum)
    stamp=$venv/.installed-$extras
    if [[ $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
        echo "Installing mass-export[$extras] into $venv (downloads torch the first time)" >&2
        local pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install)
        [[ -t 2 ]] || pip+=(-qq) # progress bars on a terminal, only errors elsewhere
        if ! "${pip[@]}" -r scripts/requirements-torch.txt >&2; then
            echo "The tested torch is not on this index; taking what pyproject.toml allows." >&2
        fi
        "${pip[@]}" -e ".[$extras]" >&2
        echo "$wanted" >"$stamp"
    fi
    PATH=$(cd "$venv" && pwd)/bin:$PATH
    export PATH
}
