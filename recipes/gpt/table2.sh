#!/usr/bin/env bash
# table2.sh SIZE [KIND]: StableGPT and GPT-2 on OpenWebText [ST, Tables 2 and 3a, Figures 1 and 11].
#
#   SIZE     KIND stable: validation loss   KIND gpt2   days (the paper's)
#   small    2.827                          2.848       3 on 8 A800
#   medium   2.569                          2.579       7.5 on 8
#   large    a curve                        a curve     14 on 16; Figure 11 is its first 100,000 updates: --max_iters=100000
#   200      200 blocks of width 768; the paper's are ViTs (Figure 13)
#
#   NANOGPT_DIR=~/nanoGPT recipes/gpt/table2.sh small stable          SMALL=1 recipes/gpt/table2.sh small gpt2
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SIZE=${1:-} KIND=${2:-stable}
case $SIZE in small | medium | large | 200) ;; *) die "SIZE = $SIZE: allowed are small, medium, large and 200" ;; esac
case $KIND in stable) KIND=stablegpt ;; gpt2) ;; *) die "KIND = $KIND: allowed are stable and gpt2" ;; esac
USER_OPTIONS=("${@:3}")
CONFIGS=train_gpt
[ "$SIZE" = small ] || CONFIGS+=" $SIZE"
[ "$KIND" = stablegpt ] || CONFIGS+=" stock"
train "table2_$SIZE-$KIND" "$CONFIGS"
compare table2
