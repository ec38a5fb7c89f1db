#!/usr/bin/env bash
# run.sh VARIANT [SEED] [OPTION...]: one trial for Table 3 of the σReparam paper, with the settings of its Table 6: SimCLR
# pretraining of ViT-B/16 on ImageNet-1k, and a linear probe of what came of it. OPTIONs are those of recipes.simclr.pretrain.
#
# Cost: 31 hours of 8 A100 (300 epochs and the probe, at 40 % of their bf16 peak; estimated).
#   DATA_DIR=/data/imagenet recipes/simclr/run.sh sigma_preln     SMALL=1 recipes/simclr/run.sh sigma_preln
# EPOCHS=100 is the paper's stability analysis (Figures 4 to 6), WARMUP=10 its Appendix D.2. DRY_RUN=1 shows the commands.
# SMALL=1: the same on 8 x 8 digits, a minute or two on one core, and a probe of the encoder before pretraining beside it.
# Interrupted? The same command goes on after the last whole epoch.
#
# What the paper leaves open:
# - From MoCo v3 for ViTs: first weights (with σReparam trunc_normal(.02)), the head (3 layers, not reparametrised, with BatchNorm over the images of all GPUs, which
#   we have not run), a cosine that begins where the warm-up ends, the class token as features, the linear probe.
# - From SimCLR: temperature 0.1, crops from 8 % of the area, no blur up to 64 pixels. Negatives come from all processes.
# - Weight decay spares vectors, gamma and the class token.
# - Both probes have a BatchNorm without parameters. That beside pretraining learns from the same augmented views, by Adam at 3e-3.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

VARIANT=${1:-} SEED=${2:-1}
row <<'TABLE' # top-1 in %, the best of the paper's trials of 300 epochs
VARIANT        | TARGET
baseline       | 72.4
frozen_patcher | 74.4
sigma          | 73.7
sigma_preln    | 74.5
TABLE
whole SEED
shift $(($# > 1 ? 2 : $#))
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())') ||
    die "torch is missing: run 'make venv', or pip install '.[timm,recipes]'"

PRETRAIN=(--variant "$VARIANT" --seed "$SEED") PROBE=(--seed "$SEED")
if [ "$SMALL" = 1 ]; then
    NAME=simclr_small EPOCHS=${EPOCHS:-20} WARMUP=${WARMUP:-3}
    MODEL=(patch_size=2 embed_dim=64 depth=4 num_heads=4)
    PRETRAIN+=(
        --data digits --batch-size 128 --lr 1.2e-2 --crop-min 0.3 --hidden-dim 128 --monitor-every 10
        --model-kwargs "${MODEL[@]}"
    )
    # whole digits: one that is cropped or shifted is another task
    PROBE+=(--epochs 20 --batch-size 64 --no-augment)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
else
    NAME=simclr EPOCHS=${EPOCHS:-300} WARMUP=${WARMUP:-40}
    [ -d "${DATA_DIR:-}/train" ] || [ "${DRY_RUN:-0}" = 1 ] || die "DATA_DIR=${DATA_DIR:-}: it has to hold train/ and val/, a folder for each class"
    # 4,096 images are 1,024 views for each of 8 GPUs, and the loss cannot do them in parts: checkpointing makes them fit.
    PRETRAIN+=(--data-dir "${DATA_DIR:-IMAGENET}" --workers 10 --precision bf16 --grad-checkpointing)
    PROBE+=(--workers 10 --precision bf16)
fi
OUT=${RUNS:-$ROOT/runs}/$NAME/$VARIANT-$EPOCHS-$WARMUP-$SEED

launch() {
    local command=(python)
    if [ "$SMALL" = 0 ] && [ "$GPUS" -gt 1 ]; then command=(torchrun --standalone --nproc-per-node "$GPUS"); fi
    command+=(-m "recipes.simclr.$1" "${@:2}")
    show_or_run "${command[@]}"
}
launch pretrain "${PRETRAIN[@]}" --epochs "$EPOCHS" --warmup-epochs "$WARMUP" --output "$OUT" "$@"
launch probe "$OUT" "${PROBE[@]}" --output "$OUT/probe"
if [ "$SMALL" = 1 ]; then launch probe "$OUT" "${PROBE[@]}" --untrained --output "$OUT/untrained"; fi
