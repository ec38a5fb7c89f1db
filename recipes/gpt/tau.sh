#!/usr/bin/env bash
# tau.sh: half, one and two times StableAtten's temperature, tau = 1.618 log2 N [ST, Figure 7, App. I]: about the same loss.
# Cost: 3 runs of 3 days of 8 A800, by the paper's; SMALL=1: half a minute a run.
#
#   NANOGPT_DIR=~/nanoGPT recipes/gpt/tau.sh        SMALL=1 recipes/gpt/tau.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for scale in 0.5 1.0 2.0; do
    train "tau_stablegpt-$scale" train_gpt --tau_scale=$scale
done
compare tau
