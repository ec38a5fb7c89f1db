#!/usr/bin/env bash
# imagenet1k.sh VARIANT [SEED] [OPTION...]: supervised ViTs on ImageNet-1k [σ, Table 1; settings: Tables 13 and 14].
#
# Cost: hours of 8 A100 at 40 % of their bf16 peak.
#   DATA_DIR=/data/imagenet recipes/vision/imagenet1k.sh sigma_b     SMALL=1 recipes/vision/imagenet1k.sh sigma_b
# Interrupted? The same command goes on after the last whole epoch.
source "$(dirname "$0")/common.sh"
VARIANT=${1:-} SEED=${2:-1}
shift $(($# > 1 ? 2 : $#))
USER_OPTIONS=("$@")
row <<'TABLE' # top-1 in %, and of the weights' average
VARIANT      | MODEL                               | KWARGS           | SETTINGS | BATCH | EPOCHS | TOP1  | EMA   | HOURS
deit_b       | vit_base_patch16_224                |                  | deit     | 1024  | 300    | 81.8  |       | 11
sigma_deit_b | sigma_vit_base_patch16_224          |                  | deit     | 1024  | 300    | 82.2  |       | 11
mae_b        | vit_base_patch16_224                |                  | mae      | 4096  | 300    | 82.1  | 82.3  | 11
sigma_b      | sigma_vit_base_patch16_224          |                  | lars     | 4096  | 250    | 81.88 | 82.37 | 9
sn_b         | sigma_vit_base_patch16_224          | reparam=spectral | lars     | 4096  | 250    | 69.81 |       | 9
wn_b         | sigma_vit_base_patch16_224_preln    | reparam=weight   | adamw    | 1024  | 250    | 77.51 |       | 9
mae_l        | vit_large_patch16_224               |                  | mae      | 4096  | 200    | 81.5  | 82.6  | 26
sigma_l      | sigma_vit_large_patch16_224         |                  | lars_l   | 4096  | 300    | 82.41 | 82.48 | 39
mae_h        | vit_huge_patch14_224                |                  | mae      | 4096  | 200    | 80.90 |       | 71
sigma_h      | sigma_vit_huge_patch14_224          |                  | lars_l   | 4096  | 170    | 81.09 |       | 61
TABLE
# The paper has no table for H: its settings are L's. Table 14 has 300 epochs for mae_l. wn_b is "SGD: No", without a cosine, warm-up or
# decay [Table 1]: DeiT's AdamW and batch, and σReparam's step schedule of as many epochs; without LayerNorm it diverges at once.
# "Base LR" is for 512 images in DeiT's recipe and 256 in MAE's; the paper does not say for LARS: 256, as is usual for it.
# For L and H "a slight weight decay cosine schedule from 0.0 to 1e-5 enables easier training" [σ, Section 4.1].
row <<'TABLE'
SETTINGS | OPTIMIZER                                                 | SCHEDULE
deit     | --opt adamw --betas 0.9 0.95 --lr 5e-4 --lr-base-size 512 | --weight-decay 0.05 --warmup-epochs 5
mae      | --opt adamw --betas 0.9 0.95 --lr 1e-4 --lr-base-size 256 | --weight-decay 0.3 --warmup-epochs 20 --warmup-prefix
adamw    | --opt adamw --betas 0.9 0.95 --lr 5e-4 --lr-base-size 512 | --sched step --decay-epochs 210
lars     | --opt lars --momentum 0.9 --lr-base-size 256 --lr 0.1     | --sched step --decay-epochs 210
lars_l   | --opt lars --momentum 0.9 --lr-base-size 256 --lr 0.15    | --weight-decay-end 1e-5
TABLE
row <<'TABLE' # of SMALL=1
SETTINGS | SMALL_SETTINGS
deit     | --lr 1e-3 --warmup-epochs 0.2 --ema-decay 0.99
mae      | --lr 1e-3 --warmup-epochs 0.2 --ema-decay 0.99
adamw    | --lr 1e-3 --decay-epochs 1.7 --ema-decay 0.99
lars     | --lr 1.6 --ema-decay 0.99 --decay-epochs 1.7
lars_l   | --lr 1.6 --ema-decay 0.99
TABLE
SMALL_OPTIONS=($SMALL_SETTINGS) DROP=0.2
if [[ $VARIANT = *_b ]]; then DROP=0.1; fi
OPTIONS=("${AUGMENTED[@]}" --erasing 0.25 --repeats 2 --drop-path $DROP --ema-decay 0.9999 $OPTIMIZER $SCHEDULE --epochs $EPOCHS)
KWARGS=($KWARGS)
if [ "$SMALL" = 1 ]; then KWARGS=("${SMALL_MODEL[@]}" "${KWARGS[@]}"); fi

train "$VARIANT-$SEED" "$BATCH" --model "$MODEL" --model-kwargs "${KWARGS[@]}" --seed "$SEED" "${OPTIONS[@]}"
