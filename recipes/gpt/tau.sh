#!/usr/bin/env bash
# tau.sh: half, one and two times StableAtten's temperature, tau = 1.618 log2 N [ST, Figure 7, App. I]: about the same loss.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for scale in 0.5 1.0 2.0; do
    train "tau_stablegpt-$scale" train_gpt --tau_scale=$scale
done
compare tau
