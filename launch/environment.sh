# shellcheck shell=bash disable=SC2154  # root: set by who sources this
# Sourced by the launch scripts: makes .venv, or keeps it when it still fits. Needs $root, the checkout.

say() { printf '==> %s\n' "$*" >&2; }

fail() {
    printf 'error: %s\n  %s\n' "$1" "$2" >&2
    exit 3
}

# Prints the version when the interpreter named $1 runs, is 3.10 to 3.13 and can make virtual environments.
# Running it is the only honest test: a pyenv shim exists for versions that are not installed.
python_version() {
    "$1" -c '
import sys
import ensurepip, venv
if not (3, 10) <= sys.version_info[:2] <= (3, 13): sys.exit(1)
print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13 python3.10 \
        /usr/bin/python3 /usr/local/bin/python3; do
        if python_version "$candidate" >/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.10 to 3.13 that can make a virtual environment" \
        "install one (Debian: apt-get install python3 python3-venv), or name it: PYTHON=/path/to/python3"
}

# What the environment was made from; when this changes it is brought up to date.
wanted_stamp() {
    cat "$root/pyproject.toml" "$root/constraints.txt" "$root"/requirements/*.txt | sha256sum | cut -d' ' -f1
}

# Whether .venv runs and holds this checkout (not one that was moved or copied) and the large packages.
environment_works() {
    "$root/.venv/bin/python" - "$root" 2>/dev/null <<'PYTHON'
import importlib.util, os, sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13): sys.exit(1)
sys.path.pop(0)
found = {name: importlib.util.find_spec(name) for name in ("pip", "torch", "lightning", "hydra", "trainer")}
if not all(found.values()): sys.exit(1)
home = os.path.dirname(os.path.dirname(os.path.realpath(found["trainer"].origin)))
sys.exit(home != os.path.realpath(sys.argv[1]))
PYTHON
}

# environment_is EXTRA: whether .venv was made from these files, with this extra (dev includes test).
environment_is() {
    local made_from made_with
    { read -r made_from made_with <"$root/.venv/.stamp"; } 2>/dev/null || return 1
    [ "$made_from" = "$(wanted_stamp)" ] && { [ "$made_with" = "$1" ] || [ "$made_with" = dev ]; }
}

pip_install() {
    "$root/.venv/bin/python" -m pip install --no-input --disable-pip-version-check \
        -c "$root/constraints.txt" "$@" >&2
}

# install_hashed NAME [OPTION...]: the packages of requirements/NAME.txt, each checked against its hash. What is built
# from source is built with the packages of requirements/build.txt.
install_hashed() {
    local name=$1
    shift
    if [ "${HASHES:-yes}" = no ]; then
        sed 's/ *\\$//; /^ *--hash/d' "$root/requirements/$name.txt" >"$root/.venv/unhashed-$name.txt"
        pip_install --no-deps --no-build-isolation "$@" -r "$root/.venv/unhashed-$name.txt"
    else
        "$root/.venv/bin/python" -m pip install --no-input --disable-pip-version-check --no-deps --require-hashes \
            --no-build-isolation "$@" -r "$root/requirements/$name.txt" >&2
    fi
}

install_into_environment() {
    local torch beside
    torch=$(grep '^torch==' "$root/constraints.txt")
    say "installing packages, each checked against its hash in requirements/ (for an index of other builds: HASHES=no)"
    install_hashed build || return 1
    say "installing PyTorch beside them, the largest part ($torch), without: each platform has its own"
    { pip_install --no-deps "$torch" && { [ "$1" = test ] || install_hashed dev; }; } &
    beside=$!
    if ! install_hashed test; then
        wait $beside || true
        return 1
    fi
    wait $beside || return 1
    pip_install "$torch" || return 1 # what it depends on and the files have not: the libraries of its build for CUDA
    say "installing this checkout"
    pip_install --no-deps --no-build-isolation -e "$root" || return 1
    # As pip does for all other packages: where PYTHONDONTWRITEBYTECODE is set, each start would compile these anew.
    "$root/.venv/bin/python" -m compileall -q "$root/trainer" >&2 || true
}

# make_environment EXTRA: afterwards .venv works and holds the packages of that extra. Two at once take turns.
make_environment() {
    local extra=$1 python started=$SECONDS
    if command -v flock >/dev/null; then
        exec 9<"$root/pyproject.toml"
        flock --nonblock 9 || { say "another launch sets up .venv; waiting for it"; flock 9; }
    fi
    if environment_works && environment_is "$extra"; then
        exec 9<&-
        return
    fi
    if [ -e "$root/.venv/.stamp" ] && environment_works; then
        say "pyproject.toml or constraints.txt changed, or more is needed: bringing .venv up to date"
        rm "$root/.venv/.stamp"
    else
        [ ! -e "$root/.venv" ] || say "the .venv here is broken or half made: making it anew"
        python=$(find_python)
        say "making .venv with $python ($(python_version "$python"))"
        rm -rf "$root/.venv"
        "$python" -m venv "$root/.venv" || fail "$python could not make .venv" "the lines above say why"
    fi
    install_into_environment "$extra" 9<&- ||
        fail "pip could not install the packages" "the lines above say why; run this again once the index can be reached"
    environment_works || fail "the new .venv does not hold what was installed" "remove .venv and run this again"
    printf '%s %s\n' "$(wanted_stamp)" "$extra" >"$root/.venv/.stamp"
    say "set up in $((SECONDS - started)) s; for the command trainer in this shell: source '$root/.venv/bin/activate'"
    exec 9<&-
}
