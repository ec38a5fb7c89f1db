#!/usr/bin/env bash
# init.sh: GPT-2 small from Xavier's initialisation, from StableInit and from nanoGPT's, without warm-up [ST, Figure 2, App. H].
# Cost: 3 runs of 3 days of 8 A800, by the paper's; SMALL=1: half a minute a run.
#
#   NANOGPT_DIR=~/nanoGPT recipes/gpt/init.sh        SMALL=1 recipes/gpt/init.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for init in xavier stable stock; do
    train "init_gpt2-$init" "train_gpt stock" --init=$init --warmup_iters=0
done
compare init
