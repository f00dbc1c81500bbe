#!/bin/bash
# ADAPTERS='adapters/*' OUT=small PARTS=8 bash examples/fleet/parallel.sh
set -euo pipefail
export ADAPTERS OUT PARTS

part() { loratools fleet squeeze "$ADAPTERS" -o "$OUT" --workers 1 --shard "$1/$PARTS" -- --rank 16; }
export -f part

if command -v parallel > /dev/null; then
    seq "$PARTS" | parallel --halt soon,fail=1 part {}
else
    seq "$PARTS" | xargs -P "$PARTS" -I {} bash -c 'part "$1"' part {}
fi
