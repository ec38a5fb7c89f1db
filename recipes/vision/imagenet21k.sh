#!/usr/bin/env bash
# imagenet21k.sh pretrain|finetune [SEED] [OPTION...]: ViT-B/16 with σReparam on ImageNet-21k (11M images of 10,450 classes, Ridnik
# et al.'s winter 2021 release), then on ImageNet-1k at 384 pixels [σ, Table 2].
#
#                    σReparam        DeiT3, 90 epochs   DeiT3, 240 epochs
#   top-1, % (EMA)   85.84 (85.87)   85.2               86.7
#
# From the paper: LAMB, a step schedule, weight decay 1e-5, no warm-up, no LayerNorm, 90 epochs, 384 pixels. Ours, where it is silent:
# DeiT3's learning rate and batch (3e-3, 2048), the step at 84 % of the epochs as in Table 13; 3e-4, 512 and 20 epochs to fine-tune.
# Cost: 90 epochs of 11M images, about 29 hours of 8 A100 at 40 % of their bf16 peak, and two for fine-tuning.
#   DATA_DIR=/data/imagenet21k recipes/vision/imagenet21k.sh pretrain && DATA_DIR=/data/imagenet recipes/vision/imagenet21k.sh finetune
#   SMALL=1: digits of 16 pixels in place of ImageNet-21k, of 24 in place of ImageNet-1k, in two minutes.
source "$(dirname "$0")/common.sh"
STAGE=${1:-} SEED=${2:-1}
shift $(($# > 1 ? 2 : $#))
USER_OPTIONS=("$@")
COMMON=(--model sigma_vit_base_patch16_224 --seed "$SEED" --opt lamb --betas 0.9 0.999 --weight-decay 1e-5 --sched step
    "${AUGMENTED[@]}" --ema-decay 0.9999)
SMALL_KWARGS=()
if [ "$SMALL" = 1 ]; then DATA=${DATA:-digits} SMALL_KWARGS=(--model-kwargs patch_size=4 embed_dim=64 depth=4 num_heads=4); fi
one_of STAGE pretrain finetune
if [ "$STAGE" = pretrain ]; then
    SMALL_OPTIONS=(--img-size 16 --batch-size 32 --epochs 20 --decay-epochs 17 --lr 3e-3 --ema-decay 0.99)
    train "imagenet21k-pretrain-$SEED" 2048 "${COMMON[@]}" "${SMALL_KWARGS[@]}" --num-classes 10450 --epochs 90 --lr 3e-3 --decay-epochs 75
else
    WEIGHTS=$RUNS/imagenet21k-pretrain-$SEED/model.safetensors
    [ -s "$WEIGHTS" ] || [ "${DRY_RUN:-0}" = 1 ] || die "$WEIGHTS is missing: run $0 pretrain $SEED first"
    SMALL_OPTIONS=(--img-size 24 --batch-size 32 --epochs 5 --decay-epochs 4 --lr 1e-3 --ema-decay 0.99)
    train "imagenet21k-finetune-$SEED" 512 "${COMMON[@]}" "${SMALL_KWARGS[@]}" --weights "$WEIGHTS" --img-size 384 \
        --epochs 20 --lr 3e-4 --decay-epochs 17 --drop-path 0.1
fi
