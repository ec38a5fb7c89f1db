#!/usr/bin/env bash
# [LR=1] [DECAY=1e-4] [DEPTH=16] train.sh MODEL [SEED] [fairseq-train options]: a run of the grid of [σ, Table 12].
#
#   MODEL                             DECAY         perplexity: train   valid   test
#   sigma, without LayerNorm          not 0         16.5                17.9    18.6
#   sigma                             0             12.9                18.5    19.3
#   preln, which is fairseq's model   0             15.4                18.1    18.7
#   postln                            0             not in the paper
#
# The paper's grid: LR 1, 1.5, 2, 2.5, DECAY 1e-3, 1e-4, 0. Cost: about 3 days of 8 A100 a run, in fp32; estimated.
#   recipes/wikitext103/train.sh sigma        SMALL=1 recipes/wikitext103/train.sh sigma: narrow, on the small data
# Interrupted? The same command goes on from the last checkpoint. Options name the run's folder too. DRY_RUN=1 shows the command.
#
# What the paper leaves open:
# - DEPTH=16 is fairseq's recipe and has the 247M parameters known of this baseline; the text's 32 layers are DEPTH=32, 448M.
# - preln is fairseq's recipe, bit for bit, without a norm after the last layer; the text calls the baseline post-LN, which is postln.
# - "All linear layers of the Transformer" are those of the blocks; adaptive input and softmax stay plain.
# - It is not said which LR and DECAY gave Table 12; preln and postln have no decay.
# - gamma starts at 1 and is decayed with everything else. The weights start as fairseq draws them.
source "$(dirname "$0")/common.sh"
run_of "$@"
[ -s "$DATA/dict.txt" ] || [ "${DRY_RUN:-0}" = 1 ] || die "no data in $DATA: run $HERE/prepare.sh first"

GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
FLAGS=(
    --arch "$ARCH" --seed "$SEED"
    --optimizer nag --lr "$LR" --weight-decay "$DECAY" --clip-norm 0.1
    --lr-scheduler cosine --max-update 286000 --lr-period-updates 270000 --t-mult 2 --lr-shrink 0.75 --min-lr 0.0001
    --warmup-updates 16000 --warmup-init-lr 1e-7 --stop-min-lr 1e-9
    --criterion adaptive_loss --ddp-backend legacy_ddp # the only backend that adaptive_loss allows
    --tokens-per-sample $TOKENS --sample-break-mode none --skip-invalid-size-inputs-valid-test
    # 3072 tokens x 8 GPUs x 3 accumulation = 73,728 tokens an update, on however many GPUs there are.
    --max-tokens 3072 --update-freq $((24 / (GPUS > 0 ? GPUS : 1)))
    --no-epoch-checkpoints # 205 epochs of 2 GB
)
if [ "$GPUS" = 0 ]; then FLAGS+=(--cpu); fi
if [ "$SMALL" = 1 ]; then
    FLAGS+=(
        --decoder-layers $((DEPTH / 4)) --decoder-embed-dim 64 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4
        --adaptive-input-cutoff 2000,5000 --adaptive-softmax-cutoff 2000,5000 --dropout 0
        --max-update 800 --lr-period-updates 700 --warmup-updates 100 --max-tokens 1024 --update-freq 1
        --validate-interval-updates 250 --save-interval-updates 250 --keep-interval-updates 1
    )
    # Two processes with a thread each are nearly twice as fast as one with two on matrices this small.
    if [ "$GPUS" = 0 ]; then FLAGS+=(--distributed-world-size 2); fi
fi

if [ "${DRY_RUN:-0}" != 1 ]; then
    mkdir -p "$OUT"
    echo "$ARCH, seed $SEED, learning rate $LR, weight decay $DECAY, $GPUS GPU(s); log and checkpoints in $OUT"
fi
show_or_run fairseq-train "$DATA" --task language_modeling --user-dir "$PLUGIN" "${FLAGS[@]}" --num-workers 0 --save-dir "$OUT" \
    --log-format simple --log-interval 20 --log-file "$OUT/train.log" "${@:3}"
if [ "${DRY_RUN:-0}" != 1 ]; then echo "next, with LR, DECAY and DEPTH as here: $HERE/evaluate.sh $*"; fi
