#!/usr/bin/env bash
# robustness_grid.sh MODEL [SEED] [OPTION...]: eight ViT-B/16 on ImageNet-1k from DeiT's recipe, base learning rate {5e-4, 1e-3} x batch
# {1024, 2048} x warm-up {0, 5} epochs [σ, Section 4.1].
#
# It ends with a table: a run diverges where its loss becomes NaN, which ends it, or its accuracy is lost. The alarms of the monitor
# stand beside that and end nothing. Cost: 300 epochs x 8, about four days of 8 A100 at 40 % of their bf16 peak.
#   DATA_DIR=/data/imagenet recipes/vision/robustness_grid.sh sigma
#   SMALL=1 recipes/vision/robustness_grid.sh         all four models, three seeds, on CIFAR-10: 45 minutes on 2 cores
source "$(dirname "$0")/common.sh"
if [ "$SMALL" = 1 ]; then
    small_images
    show_or_run python -m recipes.vision.grid --output "$RUNS/grid" --data "$DATA" --data-dir "$DATA_DIR" "$@"
    exit
fi
MODEL=${1:-} SEED=${2:-1} USER_OPTIONS=("${@:3}")
row <<'TABLE' # top-1, in %
MODEL  | ARCH                       | CONVERGE         | TOP1
vit    | vit_base_patch16_224       | 1 of 8           | -
sigma  | sigma_vit_base_patch16_224 | 8 of 8           | 81.4 ± 0.52
stable | stablevit_base             | not in the paper |
TABLE
GRID=()
became_nan() { grep -qs '"stopped"' "$1/log.jsonl"; }
for LR in 5e-4 1e-3; do
    for BATCH in 1024 2048; do
        for WARMUP in 0 5; do
            NAME=grid-$MODEL-$LR-$BATCH-$WARMUP-$SEED
            GRID+=("$RUNS/$NAME")
            if became_nan "$RUNS/$NAME"; then continue; fi # when it is called again
            train "$NAME" $BATCH --model $ARCH --seed "$SEED" --epochs 300 \
                --lr $LR --lr-base-size 512 --warmup-epochs $WARMUP --betas 0.9 0.95 --weight-decay 0.05 \
                "${AUGMENTED[@]}" --erasing 0.25 --repeats 2 --drop-path 0.1 ||
                became_nan "$RUNS/$NAME" || die "$NAME did not end; the same command goes on with it"
        done
    done
done
if [ "${DRY_RUN:-0}" != 1 ]; then python -m recipes.vision.diverged "${GRID[@]}"; fi
