#!/usr/bin/env bash
# learning_rate.sh: StableGPT-S at 6e-4, 1.2e-3, 1.8e-3 and 2.4e-3 [ST, Figure 6, App. I]: 2.827, and 2.819 at 1.2e-3.
# Cost: 4 runs of 3 days of 8 A800, by the paper's; SMALL=1: half a minute a run.
#
#   NANOGPT_DIR=~/nanoGPT recipes/gpt/learning_rate.sh        SMALL=1 recipes/gpt/learning_rate.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for lr in 6e-4 1.2e-3 1.8e-3 2.4e-3; do
    train "learning_rate_stablegpt-$lr" train_gpt $(rate $lr)
done
compare learning_rate
