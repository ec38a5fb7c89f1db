#!/usr/bin/env bash
# robustness_grid.sh MODEL [SEED]: eight ViT-B/16 on ImageNet-1k from DeiT's recipe, base learning rate {5e-4, 1e-3} x batch
# {1024, 2048} x warm-up {0, 5} epochs [σ, Section 4.1].
#
#   MODEL    model                       converge   top-1, %
#   vit      ViT-B/16                    1 of 8     -
#   sigma    σReparam, no LayerNorm      8 of 8     81.4 ± 0.52
#   stable   StableViT-B/16              not in the paper
#
# Cost: 300 epochs x 8, about four days of 8 A100 at 40 % of their bf16 peak; a run that diverges ends there.
#   DATA_DIR=/data/imagenet recipes/vision/robustness_grid.sh sigma
#   SMALL=1 recipes/vision/robustness_grid.sh         all four models, three seeds, on CIFAR-10: 45 minutes on 2 cores
source "$(dirname "$0")/common.sh"
if [ "$SMALL" = 1 ]; then
    small_images
    exec python -m recipes.vision.grid --output "$RUNS/grid" --data "$DATA" --data-dir "$DATA_DIR" "$@"
fi
MODEL=${1:-} SEED=${2:-1}
case $MODEL in
vit) NAME=vit_base_patch16_224 ;;
sigma) NAME=sigma_vit_base_patch16_224 ;;
stable) NAME=stablevit_base ;;
*) die "MODEL = $MODEL: allowed are vit, sigma and stable" ;;
esac
for LR in 5e-4 1e-3; do
    for BATCH in 1024 2048; do
        for WARMUP in 0 5; do
            train "grid-$MODEL-$LR-$BATCH-$WARMUP-$SEED" $BATCH --model $NAME --seed "$SEED" --epochs 300 \
                --lr $LR --lr-base-size 512 --warmup-epochs $WARMUP --betas 0.9 0.95 --weight-decay 0.05 \
                "${AUGMENTED[@]}" --erasing 0.25 --repeats 2 --drop-path 0.1 --stop-on-alarm ||
                echo "lr $LR, batch $BATCH, warm-up $WARMUP did not end; the next one"
        done
    done
done
