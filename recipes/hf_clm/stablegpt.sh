#!/usr/bin/env bash
# stablegpt.sh SIZE [KIND] [SEED] [OPTION...]: StableGPT and GPT-2 on OpenWebText [ST, Tables 2 and 3a, Figures 1-4, 6, 7, 11].
#
#   recipes/hf_clm/stablegpt.sh S stable     WARMUP=0 recipes/hf_clm/stablegpt.sh S gpt     SMALL=1 recipes/hf_clm/stablegpt.sh S gpt
# LR, WARMUP (2000; 0 for the paper's stability tests) and STEPS (600000) can be given; OPTIONs are those of recipes.hf_clm.train. STEPS
# ends the run and leaves the cosine at 600,000 updates, "including all learning rate settings" [ST, App. K]; --decay-steps shortens it.
# ENGINE=fsdp2 shards the model (ddp: it does not). DATA_DIR: tokens that are prepared already. DRY_RUN=1 shows the commands.
# Table 2 has 2.819 for S at LR=1.2e-3; Figure 11 is of STEPS=100000.
# SMALL=1: the same for 4 blocks of width 128 at 3e-2, where GPT collapses, on the text of `python -m recipes.small_data lm`: two minutes on one core.
# Interrupted? The same command goes on after the last checkpoint.
#
# What the paper leaves open:
# - Alpha and others are recipes/gpt/common.sh's. Blocks begin at random places of the token file. Only matrices are decayed.
# - A block of 1,024 has 1,023 targets, nanoGPT's 1,024; the validation loss is of all of val.bin, nanoGPT's of 200 random batches.
# - OpenWebText is prepared as nanoGPT does, from the Hub's Parquet copy (`pip install datasets`); we have not run it. nanoGPT's
#   train.bin and val.bin will do: DATA_DIR=FOLDER, with GPT-2's tokenizer saved to FOLDER/tokenizer.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
SIZE=${1:-} KIND=${2:-stable} SEED=${3:-1}
shift $(($# > 3 ? 3 : $#))
row <<'TABLE' # the paper's validation losses; hours of 8 A100 for 600,000 updates
SIZE | PARAMETERS | PEAK   | STABLE_LOSS | GPT_LOSS | HOURS
S    | 124M       | 6e-4   | 2.827       | 2.848    | 70
M    | 350M       | 3e-4   | 2.569       | 2.579    | 199
L    | 774M       | 2.5e-4 | a curve     | a curve  | 427
TABLE
row <<'TABLE' # gpt is nanoGPT's
KIND   | MODEL
stable |
gpt    | --norm layernorm --attention dot --init stock
TABLE
ENGINE=${ENGINE:-ddp} DEVICE_BATCH=${DEVICE_BATCH:-12}
one_of ENGINE ddp fsdp2
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())') ||
    die "torch is missing: run 'make venv', or pip install '.[hf,recipes]'"

PREPARE=() DECAY=() LAUNCH=(python -m recipes.hf_clm.train)
if [ "$SMALL" = 1 ]; then
    RUNS=${RUNS:-$ROOT/runs}/hf_clm_small SIZE=small LR=${LR:-3e-2} WARMUP=${WARMUP:-0} STEPS=${STEPS:-300}
    DATA=${DATA_DIR:-$RUNS/data}
    RAW=${STABLE_DATA:-$ROOT/runs/data}/lm
    if [ -z "${DATA_DIR:-}" ] && [ "${DRY_RUN:-0}" != 1 ]; then small_data lm {train,valid}.txt; fi
    PREPARE=(--train "$RAW/train.txt" --val "$RAW/valid.txt")
    OPTIONS=(--batch-tokens 2048 --device-batch 16 --eval-every 100 --save-every 100 --monitor-every 10)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
else
    RUNS=${RUNS:-$ROOT/runs}/hf_clm LR=${LR:-$PEAK} WARMUP=${WARMUP:-2000} STEPS=${STEPS:-600000}
    [ "$STEPS" = 600000 ] || DECAY=(--decay-steps 600000)
    DATA=${DATA_DIR:-$RUNS/data}
    OPTIONS=(--batch-tokens $((480 * 1024)) --device-batch "$DEVICE_BATCH" --workers 4 --compile)
    if [ "$GPUS" -gt 1 ]; then
        LAUNCH=(accelerate launch --config_file "$ROOT/recipes/hf_clm/configs/$ENGINE.yaml" --num_processes "$GPUS" "${LAUNCH[@]:1}")
    fi
fi

if [ ! -f "$DATA/val.bin" ]; then show_or_run python -m recipes.hf_clm.prepare --output "$DATA" "${PREPARE[@]}"; fi
show_or_run "${LAUNCH[@]}" --output "$RUNS/$SIZE-$KIND-$LR-$WARMUP-$SEED" --data "$DATA" --size "$SIZE" $MODEL \
    --lr "$LR" --warmup "$WARMUP" --steps "$STEPS" "${DECAY[@]}" "${OPTIONS[@]}" --seed "$SEED" "$@"
