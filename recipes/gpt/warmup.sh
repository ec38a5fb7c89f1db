#!/usr/bin/env bash
# warmup.sh: GPT-2 and StableGPT without warm-up, as in [ST, Figures 2 to 4], at 1, 2 and 4 times the learning rate, which are Figure 6's.
# Small, the learning rate is nanoGPT's for its character model, 1e-3; SCALES="1 2 4 16 32" goes on to where something breaks.
#
# Cost: 6 runs of 3 days of 8 A800, by the paper's; SMALL=1: half a minute a run.
#   NANOGPT_DIR=~/nanoGPT SMALL=1 SEEDS="1 2 3" recipes/gpt/warmup.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
BASE=$([ "$SMALL" = 1 ] && echo 1e-3 || echo 6e-4)
for scale in ${SCALES:-1 2 4}; do
    for kind in gpt2 stablegpt; do
        train "warmup_$kind-x$scale" "train_gpt$([ "$kind" = stablegpt ] || echo " stock")" $(rate "$(python -c "print($scale * $BASE)")") --warmup_iters=0
    done
done
compare warmup
