#!/usr/bin/env bash
# train.sh MODEL [SEED] [fairseq-train options]: one column of the paper's Tables 7 and 9 with the settings of its Table 8.
#   HOURS=100, OPTIMIZER=adagrad   Table 7, top          HOURS=960                    Table 9, top: step-wise decay
#   HOURS=100, OPTIMIZER=lars      Table 7, bottom       HOURS=960 SCHEDULE=cosine    Table 9, bottom
#   DEPTH=72                       the deep models of Figure 14, with half the batch
# SMALL=1 train.sh MODEL [SEED]: a narrow model on the small data. Interrupted? The same command goes on from where it was.
# Options name the run's folder too. DRY_RUN=1 shows the command.
source "$(dirname "$0")/common.sh"
MODELS="postln preln sigma sigma_postln sn sn_postln wn wn_postln"
[ $# -ge 1 ] || die "give a MODEL: $MODELS"
MODEL=$1 SEED=${2:-1} OPTIMIZER=${OPTIMIZER:-adagrad} SCHEDULE=${SCHEDULE:-step} DEPTH=${DEPTH:-36}
shift $(($# > 1 ? 2 : 1))
[[ $SEED =~ ^[0-9]+$ ]] || die "SEED = $SEED: allowed are whole numbers"
case $OPTIMIZER in adagrad | lars) ;; *) die "OPTIMIZER=$OPTIMIZER: allowed are adagrad and lars" ;; esac
case $SCHEDULE in step | cosine | plateau) ;; *) die "SCHEDULE=$SCHEDULE: allowed are step, cosine and plateau" ;; esac
case $DEPTH in 36 | 72) ;; *) die "DEPTH=$DEPTH: allowed are 36 and 72" ;; esac
[ -s "$MANIFEST" ] || [ "${DRY_RUN:-0}" = 1 ] || die "no $MANIFEST: run $HERE/prepare.sh first"

# Base learning rates: Adagrad, LARS. SN's and WN's are not in the paper; these are σReparam's and the plain models'.
case $MODEL in
postln) BLOCKS=(--norm layernorm --residual post-ln --reparam none) LR=(0.03 0.1) ;;
preln) BLOCKS=(--norm layernorm --residual pre-ln --reparam none) LR=(0.5 0.5) ;;
sigma) BLOCKS=(--norm none --residual pre-ln --reparam sigma) LR=(1 1) ;;
sigma_postln) BLOCKS=(--norm layernorm --residual post-ln --reparam sigma) LR=(1 0.3) ;;
sn) BLOCKS=(--norm none --residual pre-ln --reparam spectral) LR=(1 1) ;;
sn_postln) BLOCKS=(--norm layernorm --residual post-ln --reparam spectral) LR=(1 0.3) ;;
wn) BLOCKS=(--norm none --residual pre-ln --reparam weight) LR=(0.5 0.5) ;;
wn_postln) BLOCKS=(--norm layernorm --residual post-ln --reparam weight) LR=(0.03 0.1) ;;
*) die "MODEL = $MODEL: allowed are $MODELS" ;;
esac
UPDATES=500000 WARMUP=64000 DECAY=330000 DROPOUT=0.3
if [ "$OPTIMIZER" = lars ]; then LR=${LR[1]} WARMUP=0 DECAY=300000; else LR=${LR[0]}; fi
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
case $MODEL in
sigma*)
    BLOCKS+=(--plain-conv --qkv "$([ "$OPTIMIZER" = lars ] && echo joint || echo qk_joint)")
    if [ "$HOURS" = 960 ]; then BLOCKS+=(--gamma-lr-scale 2); fi
    ;;
sn*) BLOCKS+=(--plain-conv --qkv "$([ "$OPTIMIZER" = lars ] && echo joint || echo qk_joint)") ;;
wn*) BLOCKS+=(--plain-conv) ;;
esac

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
case $SCHEDULE in
step) FLAGS+=(--lr-scheduler step --lr-deacy-period $((DECAY - WARMUP)) --lr-decay 0.5) ;;
cosine) FLAGS+=(--lr-scheduler cosine --lr-period-updates $((UPDATES - WARMUP))) ;;
plateau) FLAGS+=(--lr-scheduler reduce_lr_on_plateau --lr-shrink 0.5) ;;
esac
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
