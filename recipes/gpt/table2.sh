#!/usr/bin/env bash
# table2.sh SIZE [KIND]: StableGPT and GPT-2 on OpenWebText [ST, Tables 2 and 3a, Figures 1 and 11].
#
# SIZE 200 is 200 blocks of width 768; the paper's are ViTs (Figure 13). Figure 11: --max_iters=100000.
#   NANOGPT_DIR=~/nanoGPT recipes/gpt/table2.sh small stable          SMALL=1 recipes/gpt/table2.sh small gpt2
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SIZE=${1:-} KIND=${2:-stable}
row <<'TABLE'
SIZE   | SIZE_CONFIG | STABLE_LOSS | GPT2_LOSS | COST
small  |             | 2.827       | 2.848     | 3 days of 8 A800
medium | medium      | 2.569       | 2.579     | 7.5 days of 8 A800
large  | large       | a curve     | a curve   | 14 days of 16 A800
200    | 200         |             |           |
TABLE
row <<'TABLE'
KIND   | NAME      | KIND_CONFIG
stable | stablegpt |
gpt2   | gpt2      | stock
TABLE
USER_OPTIONS=("${@:3}")
train "table2_$SIZE-$NAME" "train_gpt $SIZE_CONFIG $KIND_CONFIG"
compare table2
