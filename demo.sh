#!/usr/bin/env bash
# The main job on the demo corpus: click log -> filter -> crawl -> shard -> train -> evaluated retrieval model.
# Run it again: finished stages are reused, an interrupted one goes on. Arguments go to `tandem run`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./setup.sh
.venv/bin/python -m demo.corpus
.venv/bin/python -m demo.weights >/dev/null
.venv/bin/tandem run recipes/demo.yaml "$@"
.venv/bin/tandem results recipes/demo.yaml
