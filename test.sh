#!/usr/bin/env bash
# Runs the tests, after setting up if needed. `./test.sh --fast` leaves out what is marked slow.
# Other arguments go to pytest: ./test.sh tests/test_rules.py -k ctr
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 NO_ALBUMENTATIONS_UPDATE=1 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1
export TOKENIZERS_PARALLELISM=false
arguments=()
for argument in "$@"; do
    if [ "$argument" = "--fast" ]; then arguments+=(-m "not slow"); else arguments+=("$argument"); fi
done
exec .venv/bin/python -m pytest -n "${TANDEM_TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder ${arguments[@]+"${arguments[@]}"}
