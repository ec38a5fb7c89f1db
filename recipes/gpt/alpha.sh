#!/usr/bin/env bash
# alpha.sh: StableNorm's alpha, against LayerNorm and RMSNorm, in StableGPT-S without warm-up [ST, Figure 3].
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for alpha in 0.0 0.125 0.25 0.375 0.5; do
    train "alpha_stablegpt-$alpha" train_stablegpt_small --alpha=$alpha --warmup_iters=0
done
for norm in layernorm rmsnorm; do
    train "alpha_stablegpt-$norm" train_stablegpt_small --norm=$norm --warmup_iters=0
done
compare alpha
