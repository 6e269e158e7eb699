#!/usr/bin/env bash
# What a newcomer sees: clones the project's HEAD, runs ./demo.sh, and runs it again; prints the seconds of each.
#   benchmarks/fresh_clone.sh             set-up, demo, second run
#   benchmarks/fresh_clone.sh --kills 5   then once more from scratch, killed by SIGKILL five times on the way
# With --kills it checks that the model that comes out is the same file as without.
set -euo pipefail
source=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
kills=0
[ "${1:-}" = "--kills" ] && kills=$2
work=$(mktemp -d)
git clone --quiet "$source" "$work/tandem"
cd "$work/tandem"

timed() {
    local name=$1 begin=$SECONDS
    shift
    "$@" >"$work/$name.log" 2>&1
    echo "$name: $((SECONDS - begin)) s"
}

model_hash() { sha256sum runs/demo/finetune/*/out/model.safetensors | cut -d' ' -f1; }

timed setup ./setup.sh
timed demo ./demo.sh
tail -n 8 "$work/demo.log"
timed again ./demo.sh
first=$(model_hash)
echo "model: $first"

if [ "$kills" -gt 0 ]; then
    mv runs runs_uninterrupted
    for number in $(seq "$kills"); do
        setsid ./demo.sh >"$work/killed_$number.log" 2>&1 &
        leader=$!
        sleep $((30 + RANDOM % 60))
        kill -KILL -- "-$leader" 2>/dev/null || true
        wait "$leader" 2>/dev/null || true
        echo "killed $number: $(grep -E '^\[' "$work/killed_$number.log" | tail -n 1)"
        sleep 2
    done
    timed after_kills ./demo.sh
    second=$(model_hash)
    echo "model: $second"
    [ "$first" = "$second" ] && echo "equal after $kills kills" || { echo "NOT equal after $kills kills"; exit 1; }
fi
echo "logs and clone: $work"
