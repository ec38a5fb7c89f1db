#!/usr/bin/env bash
# l2.sh: StableAtten against L2 attention, tied and not, and QK-norm, in StableGPT-L [ST, Figure 14, App. N]: StableAtten is best,
# tied L2 notably worst. App. K's settings: 100,000 updates of the schedule of 600,000.
# Cost: 4 runs of 2.5 days of 16 A800, by the paper's; SMALL=1: half a minute a run.
#
#   NANOGPT_DIR=~/nanoGPT recipes/gpt/l2.sh        SMALL=1 recipes/gpt/l2.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for attention in stable l2 l2_tied qknorm; do
    train "l2_stablegpt-$attention" "train_gpt large" --attention=$attention --max_iters=100000
done
compare l2
