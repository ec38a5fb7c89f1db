#!/usr/bin/env bash
# ablations.sh WHAT VALUE [SEED] [OPTION...]: one part of StableViT-L/16 at a time, no warm-up, on ImageNet-1k [ST, Figures 2-4, 14].
#
#   WHAT        VALUE                            the rest is ViT-L   the paper finds
#   alpha       0 0.125 0.25 0.375 0.5           StableNorm          too small starves gradients, too large is unstable; 0.5 is RMSNorm
#   heads       4 8 16 32                        all of it           more heads are more stable
#   init        stable xavier timm               the init            StableInit outlasts Xavier
#   norm        stable layernorm rmsnorm         the norm
#   attention   stable dot qknorm l2 l2_tied     the attention       StableAtten is more stable than dot-product attention
#   tau_scale   0.5 1 2                          all of it           robust (shown for GPT)
#
#   DATA_DIR=/data/imagenet recipes/vision/ablations.sh alpha 0.25       SMALL=1 recipes/vision/ablations.sh heads 8
source "$(dirname "$0")/common.sh"
WHAT=${1:-} VALUE=${2:-} SEED=${3:-1}
shift $(($# > 3 ? 3 : $#))
USER_OPTIONS=("$@")
[ -n "$VALUE" ] || die "give WHAT {alpha,heads,init,norm,attention,tau_scale} and a VALUE"
KWARGS=() PLAIN="norm=layernorm attention=dot init=timm"
if [ "$SMALL" = 1 ]; then KWARGS=("${SMALL_MODEL[@]}"); fi
case $WHAT in # later values win
alpha) KWARGS+=($PLAIN norm=stable "alpha=$VALUE") ;;
heads) KWARGS+=("num_heads=$VALUE") ;;
init | norm | attention) KWARGS+=($PLAIN "$WHAT=$VALUE") ;;
tau_scale) KWARGS+=("tau_scale=$VALUE") ;;
*) die "WHAT = $WHAT: allowed are alpha, heads, init, norm, attention and tau_scale" ;;
esac
SMALL_OPTIONS=(--lr 1e-3)
train "ablation-$WHAT-$VALUE-$SEED" 1024 --model stablevit_large --model-kwargs "${KWARGS[@]}" --seed "$SEED" \
    --epochs "${EPOCHS:-150}" --lr 1e-3 --betas 0.9 0.99 --weight-decay 0.1 --drop-path 0.5 "${AUGMENTED[@]}"
