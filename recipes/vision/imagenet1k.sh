#!/usr/bin/env bash
# imagenet1k.sh VARIANT [SEED] [OPTION...]: supervised ViTs on ImageNet-1k [σ, Table 1; settings: Tables 13 and 14].
#
#   VARIANT        model                     top-1, % (EMA)   epochs   8 A100, hours (at 40 % of bf16 peak)
#   deit_b         ViT-B/16, DeiT's recipe   81.8             300     11
#   sigma_deit_b   σReparam in its place     82.2             300     11
#   mae_b          ViT-B/16, MAE's recipe    82.1  (82.3)     300     11
#   sigma_b        σReparam, LARS            81.88 (82.37)    250      9
#   sn_b           spectral norm, LARS       69.81            250      9
#   wn_b           weight norm, AdamW        77.51            250      9
#   mae_l          ViT-L/16, MAE's recipe    81.5  (82.6)     200     26
#   sigma_l        σReparam, LARS            82.41 (82.48)    300     39
#   mae_h          ViT-H/14, MAE's recipe    80.90            200     71
#   sigma_h        σReparam, LARS            81.09            170     61
#
#   DATA_DIR=/data/imagenet recipes/vision/imagenet1k.sh sigma_b     SMALL=1 recipes/vision/imagenet1k.sh sigma_b
# Interrupted? The same command goes on after the last whole epoch.
source "$(dirname "$0")/common.sh"
[ $# -ge 1 ] || die "give a VARIANT: {deit,sigma_deit,mae,sigma,sn,wn}_b, {mae,sigma}_l, {mae,sigma}_h"
VARIANT=$1 SEED=${2:-1}
shift $(($# > 1 ? 2 : 1))
USER_OPTIONS=("$@")

case $VARIANT in
*_b) SIZE=base_patch16_224 DROP=0.1 ;;
*_l) SIZE=large_patch16_224 DROP=0.2 ;;
*_h) SIZE=huge_patch14_224 DROP=0.2 ;; # the paper has no table for H; L's settings
*) die "VARIANT = $VARIANT: allowed are {deit,sigma_deit,mae,sigma,sn,wn}_b, {mae,sigma}_l, {mae,sigma}_h" ;;
esac
OPTIONS=("${AUGMENTED[@]}" --erasing 0.25 --repeats 2 --drop-path $DROP --ema-decay 0.9999)
# "Base LR" is for 512 images in DeiT's recipe and 256 in MAE's; the paper does not say for LARS: 256, as is usual for it.
LARS=(--opt lars --momentum 0.9 --lr-base-size 256)
SMALL_LARS=(--lr 1.6 --ema-decay 0.99)
ADAMW=(--opt adamw --betas 0.9 0.95 --lr 5e-4 --lr-base-size 512) # DeiT's [σ, Table 13]
case $VARIANT in
deit_b | sigma_deit_b)
    BATCH=1024
    OPTIONS+=("${ADAMW[@]}" --weight-decay 0.05 --warmup-epochs 5 --epochs 300)
    SMALL_OPTIONS=(--lr 1e-3 --warmup-epochs 0.2 --ema-decay 0.99)
    ;;
mae_*)
    BATCH=4096
    EPOCHS=200 && [ "$VARIANT" = mae_b ] && EPOCHS=300 # Table 1; Table 14 has 300 for L
    OPTIONS+=(--opt adamw --betas 0.9 0.95 --lr 1e-4 --lr-base-size 256 --weight-decay 0.3 --warmup-epochs 20 --warmup-prefix --epochs $EPOCHS)
    SMALL_OPTIONS=(--lr 1e-3 --warmup-epochs 0.2 --ema-decay 0.99)
    ;;
sigma_b | sn_b)
    BATCH=4096
    OPTIONS+=("${LARS[@]}" --lr 0.1 --sched step --decay-epochs 210 --epochs 250)
    SMALL_OPTIONS=("${SMALL_LARS[@]}" --decay-epochs 1.7)
    ;;
wn_b) # "SGD: No", and no cosine, warm-up or decay [σ, Table 1]: DeiT's AdamW and batch; the step schedule is σReparam's, of as many epochs
    BATCH=1024
    OPTIONS+=("${ADAMW[@]}" --sched step --decay-epochs 210 --epochs 250)
    SMALL_OPTIONS=(--lr 1e-3 --decay-epochs 1.7 --ema-decay 0.99)
    ;;
sigma_l | sigma_h)
    BATCH=4096
    EPOCHS=300 && [ "$VARIANT" = sigma_h ] && EPOCHS=170
    # "For larger models a slight weight decay cosine schedule from 0.0 to 1e-5 enables easier training" [σ, Section 4.1].
    OPTIONS+=("${LARS[@]}" --lr 0.15 --weight-decay-end 1e-5 --epochs $EPOCHS)
    SMALL_OPTIONS=("${SMALL_LARS[@]}")
    ;;
esac
KWARGS=()
if [ "$SMALL" = 1 ]; then KWARGS=("${SMALL_MODEL[@]}"); fi
case $VARIANT in
deit_b | mae_*) MODEL=vit_$SIZE ;;
wn_b) MODEL=sigma_vit_${SIZE}_preln KWARGS+=(reparam=weight) ;; # without LayerNorm it diverges at once [σ, Table 1]
sn_b) MODEL=sigma_vit_$SIZE KWARGS+=(reparam=spectral) ;;
*) MODEL=sigma_vit_$SIZE ;;
esac

train "$VARIANT-$SEED" "$BATCH" --model "$MODEL" --model-kwargs "${KWARGS[@]}" --seed "$SEED" "${OPTIONS[@]}"
