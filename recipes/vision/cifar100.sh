#!/usr/bin/env bash
# cifar100.sh MODEL [SEED] [OPTION...]: small ViTs on CIFAR-100, then on corrupted images [ST, Table 4].
#
# 200 epochs, batch 512, learning rate 1e-3, weight decay 1e-4; the rest is ours, as the paper is silent: patches of 4, cosine, AdamW,
# and the augmentations of its ImageNet runs. Cost: about an hour of one A100.
#   recipes/vision/cifar100.sh stable      CIFAR_C=/data/CIFAR-100-C for the published corruptions; without it they are made here
#   SMALL=1 recipes/vision/cifar100.sh stable      CIFAR-10, two epochs, 500 corrupted images of each kind
source "$(dirname "$0")/common.sh"
if [ "$SMALL" = 0 ]; then DATA=${DATA:-cifar100}; fi
MODEL=${1:-} SEED=${2:-1}
shift $(($# > 1 ? 2 : $#))
USER_OPTIONS=("$@")
row <<'TABLE' # top-1, in %
MODEL  | NAME                  | CIFAR_100 | CIFAR_100_C
vit    | vit_small_patch16_224 | 67.3      | 51.5
stable | stablevit_small       | 69.9      | 53.4
TABLE
IMAGES=10000 OUT=cifar100-$MODEL-$SEED SMALL_OPTIONS=(--lr 1e-3)
OPTIONS=(--model $NAME --seed "$SEED" --weight-decay 1e-4)
if [ "$SMALL" = 1 ]; then
    IMAGES=500
    train "$OUT" 128 "${OPTIONS[@]}" --model-kwargs "${SMALL_MODEL[@]}"
else
    train "$OUT" 512 "${OPTIONS[@]}" --model-kwargs patch_size=4 --epochs 200 --lr 1e-3 "${AUGMENTED[@]}"
fi
if [ "${DRY_RUN:-0}" = 1 ]; then exit; fi
python -m recipes.vision.corruptions "$RUNS/$OUT" --images $IMAGES ${CIFAR_C:+--cifar-c "$CIFAR_C"}
