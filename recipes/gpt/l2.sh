#!/usr/bin/env bash
# l2.sh: StableAtten against L2 attention, tied and not, and QK-norm, in StableGPT-L [ST, Figure 14, App. N]: StableAtten is best,
# tied L2 notably worst.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for attention in stable l2 l2_tied qknorm; do
    train "l2_stablegpt-$attention" train_stablegpt_large --attention=$attention
done
compare l2
