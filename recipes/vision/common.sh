# Read by the recipes of this folder: where things are, how a model is trained, and what SMALL=1 changes.
#
# What the paper leaves open:
# - The moving average's decay is 0.9999, and the patch of ST's 200 blocks 14. ST gives beta2 and clipping twice: we take its Table
#   3b, 0.99 and no clipping. Figure 4's caption names 8 heads; the other numbers are ours.
# - A run has diverged if it becomes NaN, or ends with at most half of its grid's best accuracy or twice chance.
# - LARS adapts vectors, such as gamma, too, and where there is no weight decay; so a small σReparam model trains.
# - Attention runs in bf16, sigma in fp32; the σReparam paper keeps attention in fp32 too.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
RUNS=${RUNS:-$ROOT/runs}/vision$([ "$SMALL" = 1 ] && echo _small || true)
DEVICE_BATCH=${DEVICE_BATCH:-128} # images in a GPU's memory at a time

GPUS=$(python -c 'import torch; print(torch.cuda.device_count())') ||
    die "torch is missing: run 'make venv', or pip install '.[timm,recipes]'"

# small_images: sets DATA and DATA_DIR to CIFAR-10 as recipes/small_data.py gets it, or to scikit-learn's digits at its size.
small_images() {
    DATA_DIR=${DATA_DIR:-${STABLE_DATA:-$ROOT/runs/data}}
    if [ -n "${DATA:-}" ] || [ "${DRY_RUN:-0}" = 1 ]; then DATA=${DATA:-cifar10} && return; fi
    STABLE_DATA=$DATA_DIR python -m recipes.small_data images || exit 1
    DATA=cifar10
    if [ ! -e "$DATA_DIR/cifar10.npz" ] && [ ! -e "$DATA_DIR/cifar-10-batches-py" ]; then DATA=digits32; fi
}

# train NAME BATCH OPTION...: recipes.vision.train on all GPUs, BATCH images an update. Later options win: after these come those of
# SMALL_OPTIONS where SMALL=1, and the user's last. DRY_RUN=1 shows the command.
SMALL_OPTIONS=() USER_OPTIONS=()
train() {
    local name=$1 batch=$2 launch=(python)
    shift 2
    whole SEED
    if [ "$SMALL" = 1 ]; then
        # Width 64 and 8 blocks on CIFAR-10: a minute an epoch on one core.
        small_images
        set -- "$@" --data "$DATA" --data-dir "$DATA_DIR" --batch-size 128 --accumulation 1 --epochs 2 \
            --lr-base-size None --repeats 1 --drop-path 0 --monitor-every 50 "${SMALL_OPTIONS[@]}"
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    else
        if [ -z "${DATA:-}" ] && [ ! -d "${DATA_DIR:-}/train" ] && [ "${DRY_RUN:-0}" != 1 ]; then
            die "DATA_DIR=${DATA_DIR:-}: it has to hold train/ and val/, a folder for each class"
        fi
        local accumulation=$((batch / ((GPUS > 0 ? GPUS : 1) * DEVICE_BATCH)))
        set -- --data "${DATA:-}" --data-dir "${DATA_DIR:-$ROOT/runs/data}" --num-classes 1000 --workers 10 --precision bf16 \
            --batch-size "$batch" --accumulation $((accumulation > 0 ? accumulation : 1)) "$@"
        if [ "$GPUS" -gt 1 ]; then launch=(torchrun --standalone --nproc-per-node "$GPUS"); fi
    fi
    launch+=(-m recipes.vision.train --output "$RUNS/$name" "$@" "${USER_OPTIONS[@]}")
    if [ "${DRY_RUN:-0}" = 1 ]; then
        printf '%q ' "${launch[@]}" && echo && return
    fi
    echo "$name: log, weights and checkpoint in $RUNS/$name"
    "${launch[@]}"
}

# The augmentations of both papers [σ, Tables 13 and 14; ST, Table 3b].
AUGMENTED=(--auto-augment rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1.0 --smoothing 0.1)
SMALL_MODEL=(patch_size=8 embed_dim=64 depth=8 num_heads=4)
