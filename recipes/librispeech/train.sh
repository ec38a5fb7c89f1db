#!/usr/bin/env bash
# train.sh MODEL [SEED] [fairseq-train options]: a column of the σReparam paper's Tables 7 and 9 with the settings of its Table 8.
#
#   word error rates, %, of test-clean / test-other
#   MODEL          HOURS=100     HOURS=100 OPTIMIZER=lars   HOURS=960   HOURS=960 SCHEDULE=cosine
#   postln         6.2 / 17.8    8.6 / 25.6                 2.7 / 6.9   2.9 / 7.2
#   preln          6.3 / 19.3    6.4 / 19.2                 2.8 / 6.8   2.8 / 7.0
#   sigma          6.8 / 21.0    7.5 / 23.2                 2.9 / 7.3   3.0 / 7.7
#   sigma_postln   6.4 / 18.0    6.2 / 18.7                 2.9 / 7.0   2.9 / 7.2
#   sn             42.4 / 63.6   49.4 / 70.9
#   sn_postln      20.4 / 43.6   diverges
#   wn             7.3 / 22.6    8.7 / 26.4
#   wn_postln      6.7 / 19.5    7.5 / 22.1
#
#   recipes/librispeech/train.sh sigma_postln 1        SMALL=1 recipes/librispeech/train.sh sigma_postln: narrow, on the small data
#
# Cost: 500,000 updates of 1,920 s; the paper does not say how long they took, and we have not run it.
# DEPTH=72: the deep models of Figure 14, with half the batch. Interrupted? The same command goes on from where it was.
# Options name the run's folder too. DRY_RUN=1 shows the command.
#
# What the paper leaves open:
# - The convolution has no activation, zeros around the utterance, and no σReparam (--plain-conv).
# - Log-mel is Kaldi's, normalised for the utterance. CAPE has its own paper's settings for speech.
# - First weights "uniform(.036)" are 1 / sqrt(width), which it is at 768, for every layer.
# - σReparam's q and k share a sigma, v has its own; all three share one with LARS.
# - step(330k, 0.5) is one decay at update 330,000; SCHEDULE=plateau halves when the WER stops falling, as E.1 also tells. Warm-up
#   is 64k for all, as in Table 8; the text also speaks of 16k for preln.
# - LARS is timm's, always adapting, trust coefficient 0.001. Table 9 takes Table 8's learning rates.
# - The checkpoint is the one with the best WER on dev-other.
source "$(dirname "$0")/common.sh"
MODEL=${1:-} SEED=${2:-1} OPTIMIZER=${OPTIMIZER:-adagrad} SCHEDULE=${SCHEDULE:-step} DEPTH=${DEPTH:-36}
shift $(($# > 1 ? 2 : $#))
# Base learning rates: Adagrad, LARS. SN's and WN's are not in the paper; these are σReparam's and the plain models'.
row <<'TABLE'
MODEL        | NORM      | RESIDUAL | REPARAM  | ADAGRAD | LARS
postln       | layernorm | post-ln  | none     | 0.03    | 0.1
preln        | layernorm | pre-ln   | none     | 0.5     | 0.5
sigma        | none      | pre-ln   | sigma    | 1       | 1
sigma_postln | layernorm | post-ln  | sigma    | 1       | 0.3
sn           | none      | pre-ln   | spectral | 1       | 1
sn_postln    | layernorm | post-ln  | spectral | 1       | 0.3
wn           | none      | pre-ln   | weight   | 0.5     | 0.5
wn_postln    | layernorm | post-ln  | weight   | 0.03    | 0.1
TABLE
whole SEED
one_of OPTIMIZER adagrad lars
one_of SCHEDULE step cosine plateau
one_of DEPTH 36 72
[ -s "$MANIFEST" ] || [ "${DRY_RUN:-0}" = 1 ] || die "no $MANIFEST: run $HERE/prepare.sh first"

BLOCKS=(--norm $NORM --residual $RESIDUAL --reparam $REPARAM)
UPDATES=500000 WARMUP=64000 DECAY=330000 DROPOUT=0.3
if [ "$OPTIMIZER" = lars ]; then LR=$LARS WARMUP=0 DECAY=300000; else LR=$ADAGRAD; fi
LIMIT=$((2 * DECAY - UPDATES)) # with a longer warm-up the step schedule's next halving would be before the end
if [ "$SMALL" = 1 ]; then UPDATES=3000 WARMUP=300 DECAY=1200 LIMIT=1199; fi
if [ "$SCHEDULE" != step ]; then LIMIT=$((UPDATES - 1)); fi
# fairseq counts a schedule's periods from the end of the warm-up. One among the options, as Figures 12 and 13 vary it, makes them
# longer or shorter, so that they end where they did.
BEFORE=
for OPTION in "$@"; do
    if [ "$BEFORE" = --warmup-updates ]; then WARMUP=$OPTION; fi
    if [ "${OPTION%%=*}" = --warmup-updates ] && [ "$OPTION" != --warmup-updates ]; then WARMUP=${OPTION#*=}; fi
    BEFORE=$OPTION
done
[[ $WARMUP =~ ^[0-9]+$ ]] && [ "$WARMUP" -le $LIMIT ] ||
    die "--warmup-updates $WARMUP: allowed are whole numbers up to $LIMIT"
if [ "$SMALL" = 0 ] && [ "$HOURS" = 960 ]; then DROPOUT=0.1; fi
# The paper has no convolution among its reparametrised layers: blocks and final layer [App. E.2].
if [ $REPARAM != none ]; then BLOCKS+=(--plain-conv); fi
if [ $REPARAM = sigma ] || [ $REPARAM = spectral ]; then
    if [ "$OPTIMIZER" = lars ]; then BLOCKS+=(--qkv joint); else BLOCKS+=(--qkv qk_joint); fi
fi
if [ $REPARAM = sigma ] && [ "$HOURS" = 960 ]; then BLOCKS+=(--gamma-lr-scale 2); fi

GPUS=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
VALID=dev-other,dev-clean
FLAGS=(
    --task sigma_ctc --arch sigma_transformer_ctc_${DEPTH}l "${BLOCKS[@]}" --seed "$SEED"
    --criterion ctc --post-process letter --sentence-avg --zero-infinity
    --clip-norm 1 --weight-decay 0 --dropout $DROPOUT --layer-drop $DROPOUT
    # 240 s x 8 GPUs in frames of 10 ms, on however many GPUs there are; half of it for 72 layers.
    --max-tokens $((24000 * 36 / DEPTH)) --update-freq $((8 / (GPUS > 0 ? GPUS : 1)))
    --num-workers 4 --ddp-backend legacy_ddp # which lets a process leave out layers
)
if [ "$SMALL" = 1 ]; then
    VALID=valid
    FLAGS+=(
        --sample-rate 8000 --mel-bins 40 --encoder-layers 4 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512
        --dropout 0 --layer-drop 0 --freq-masks 0 --time-masks 0 --cape-global-shift 5
        --max-tokens 3200 --update-freq 1 --num-workers 0 --validate-interval 10
    )
    if [ "$OPTIMIZER" = adagrad ]; then LR=0.03; fi
    export OMP_NUM_THREADS=1
fi
if [ "$OPTIMIZER" = lars ]; then FLAGS+=(--optimizer lars --momentum 0.9); else FLAGS+=(--optimizer adagrad); fi
if [ "$SCHEDULE" = step ]; then FLAGS+=(--lr-scheduler step --lr-deacy-period $((DECAY - WARMUP)) --lr-decay 0.5); fi
if [ "$SCHEDULE" = cosine ]; then FLAGS+=(--lr-scheduler cosine --lr-period-updates $((UPDATES - WARMUP))); fi
if [ "$SCHEDULE" = plateau ]; then FLAGS+=(--lr-scheduler reduce_lr_on_plateau --lr-shrink 0.5); fi
FLAGS+=(--lr "$LR" --warmup-updates $WARMUP --warmup-init-lr 0 --max-update $UPDATES)
if [ "$GPUS" -gt 0 ]; then export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1; else FLAGS+=(--cpu); fi # "tensor cores fp32"

# Other options are another run: fairseq would resume the one that it finds.
OUT=$RUNS/$(folder_name "$MODEL-$OPTIMIZER-$SCHEDULE-$DEPTH-$SEED$*")
if [ "${DRY_RUN:-0}" != 1 ]; then
    mkdir -p "$OUT"
    echo "$MODEL, seed $SEED, $OPTIMIZER, learning rate $LR, $GPUS GPU(s); log and checkpoints in $OUT"
fi
show_or_run fairseq-train "$RUNS" --user-dir "$PLUGIN" "${FLAGS[@]}" --train-subset train --valid-subset $VALID \
    --best-checkpoint-metric wer --no-epoch-checkpoints --save-dir "$OUT" \
    --log-format simple --log-interval 100 --log-file "$OUT/train.log" "$@"
if [ "${DRY_RUN:-0}" != 1 ]; then echo "next: $HERE/evaluate.sh $OUT"; fi
