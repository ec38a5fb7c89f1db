#!/usr/bin/env bash
# alpha.sh: StableNorm and its alpha, LayerNorm and RMSNorm, in GPT-2 small without warm-up [ST, Section 3.2.1, Figure 3]. "We only
# replace the corresponding module" [ST, Section 2]: attention and initialisation stay GPT-2's, whatever the figure's legend says.
# Cost: 7 runs of 3 days of 8 A800, by the paper's; SMALL=1: half a minute a run.
#
#   NANOGPT_DIR=~/nanoGPT recipes/gpt/alpha.sh        SMALL=1 recipes/gpt/alpha.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for alpha in 0.0 0.125 0.25 0.375 0.5; do
    train "alpha_gpt2-$alpha" "train_gpt stock" --norm=stable --alpha=$alpha --warmup_iters=0
done
for norm in layernorm rmsnorm; do
    train "alpha_gpt2-$norm" "train_gpt stock" --norm=$norm --warmup_iters=0
done
compare alpha
