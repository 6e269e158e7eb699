#!/usr/bin/env bash
# Sets up .venv with the locked dependencies and the `tandem` command. Run it as often as you like: it does
# nothing when nothing changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=""
for candidate in python3.11 python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 &&
        "$candidate" -c 'import sys; sys.exit(not (sys.version_info[:2] == (3, 11)))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "setup: Python 3.11 is needed and none was found on PATH; install one, then run ./setup.sh again" >&2
    exit 2
fi

wanted=$(cat requirements.lock pyproject.toml setup.sh | sha256sum | cut -d' ' -f1)
stamp=.venv/.tandem-setup
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

# One set-up at a time: a second one waits, and then finds the work done.
if command -v flock >/dev/null 2>&1 && [ -z "${TANDEM_SETUP_LOCKED:-}" ]; then
    exec env TANDEM_SETUP_LOCKED=1 flock .setup.lock ./setup.sh
fi

echo "setup: installing into .venv (about three minutes the first time)"
.venv/bin/python -c '' 2>/dev/null || "$python" -m venv --clear .venv
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
.venv/bin/python -m pip install --quiet --no-deps -r requirements.lock
.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
echo "$wanted" >"$stamp"
echo "setup: done; the command is .venv/bin/tandem"
