#!/usr/bin/env bash
# ablations.sh WHAT VALUE [SEED] [OPTION...]: ViT-L/16 with one part replaced, no warm-up, on ImageNet-1k [ST, Figures 2-4, 14]:
# "we only replace the corresponding module" [ST, Section 2]. tau_scale, of StableAtten, is of the whole StableViT-L.
#
# HEADS (16) goes with attention: Figure 4, right, holds StableAtten against "their corresponding counterparts".
#   DATA_DIR=/data/imagenet recipes/vision/ablations.sh alpha 0.25       SMALL=1 recipes/vision/ablations.sh heads 8
source "$(dirname "$0")/common.sh"
WHAT=${1:-} VALUE=${2:-} SEED=${3:-1}
shift $(($# > 3 ? 3 : $#))
USER_OPTIONS=("$@")
row <<'TABLE'
WHAT      | OPTION    | BESIDE      | VALUES                       | THE_PAPER_FINDS
alpha     | alpha     | norm=stable | 0 0.125 0.25 0.375 0.5       | too small starves gradients, too large is unstable; 0.5 is RMSNorm [Figure 3]
heads     | num_heads |             | 4 8 16 32                    | of the original attention: more heads are more stable [Section 3.3.1, Figure 4, left]
init      | init      |             | stable xavier stock          | StableInit outlasts Xavier [Figure 2]
norm      | norm      |             | stable layernorm rmsnorm     | [Figure 3]
attention | attention |             | stable dot qknorm l2 l2_tied | StableAtten is more stable than dot-product attention [Figure 4, right]; L2: App. N
tau_scale | tau_scale |             | 0.5 1 2                      | robust [App. I, Figure 7: shown for GPT]
TABLE
[ -n "$VALUE" ] || die "give a VALUE of $WHAT, such as $VALUES"
[ -z "${HEADS:-}" ] || [ "$WHAT" = attention ] || die "HEADS=$HEADS: allowed with attention only"
KWARGS=()
if [ "$SMALL" = 1 ]; then KWARGS=("${SMALL_MODEL[@]}"); fi
if [ "$WHAT" != tau_scale ]; then KWARGS+=(norm=layernorm attention=dot init=stock); fi
KWARGS+=($BESIDE "$OPTION=$VALUE" ${HEADS:+"num_heads=$HEADS"}) # later values win
SMALL_OPTIONS=(--lr 1e-3)
train "ablation-$WHAT-$VALUE${HEADS:+-heads$HEADS}-$SEED" 1024 --model stablevit_large --model-kwargs "${KWARGS[@]}" --seed "$SEED" \
    --epochs "${EPOCHS:-150}" --lr 1e-3 --betas 0.9 0.99 --weight-decay 0.1 --drop-path 0.5 "${AUGMENTED[@]}"
