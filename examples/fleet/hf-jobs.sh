#!/bin/bash
# ORGANISATION=my-team BUCKET=my-team/small PARTS=8 bash examples/fleet/hf-jobs.sh
set -euo pipefail

for ((index = 0; index < PARTS; index++)); do
    hf jobs run --detach --flavor cpu-upgrade --timeout 2h --secrets HF_TOKEN \
        --env JOB_COMPLETION_INDEX="$index" --env JOB_COMPLETION_COUNT="$PARTS" \
        python:3.12 bash -c "pip install --quiet 'loratools[fleet,hub]' && \
            loratools fleet squeeze 'hf://$ORGANISATION/*' -o 'hf://buckets/$BUCKET' -- --rank 16"
done
