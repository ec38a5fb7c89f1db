#!/usr/bin/env bash
# train.sh ARCH [SEED] [fairseq-train options]: a run for one cell of the σReparam paper's Table 11, with the settings of its Table 10.
# ARCH is MODEL_transformer_6l, _18l, _50l or _100l; the table has BLEU, and which of three seeds diverge (DV).
#
#   recipes/wmt17_en_de/train.sh sigma_transformer_100l 1      SMALL=1 recipes/wmt17_en_de/train.sh sigma_transformer_18l
#
# Cost: 6, 13, 34 and 66 hours of 8 A100 (100,000 updates at 40 % of their bf16 peak; estimated).
# SMALL=1 is the same command on the small data, with a narrow model and a short schedule, in under 15 minutes on 2 cores.
# Interrupted? The same command goes on from the last checkpoint. Options name the run's folder too. DRY_RUN=1 shows the command.
#
# What the paper leaves open:
# - "trunc_normal(.1/.01)" is not said which where: --init-std is 0.1 by default, 0.01 is the other.
# - Decoder input and output embeddings are shared, as in torchscale's example.
# - "All provided training data" is what fairseq's prepare-wmt14en2de.sh takes for WMT'17.
# - "Best perplexity on the validation set" is of the unsmoothed loss.
source "$(dirname "$0")/common.sh"
[ $# -ge 1 ] || die "give an ARCH: {sigma,sigma_postln,deepnorm,postln,preln}_transformer_{6,18,50,100}l"
run_of "$@"
[ -s "$DATA/dict.en.txt" ] || [ "${DRY_RUN:-0}" = 1 ] || die "no data in $DATA: run $HERE/prepare.sh first"

MODEL=${ARCH%_transformer_*}
row <<'TABLE'
MODEL        | LR     | SMALL_LR | L6   | L18           | L50    | L100
preln        | 1.4e-3 | 5e-3     | 27.4 | 28.8          | 28.5   | 28.3
postln       | 1.4e-3 | 5e-3     | 27.8 | 29.0 (DV 1/3) | DV 3/3 | DV 3/3
sigma_postln | 4.5e-3 | 1e-2     | 27.8 | 28.7          | 28.5   | DV 3/3
deepnorm     | 1.4e-3 | 5e-3     | 27.9 | 29.2          | 29.2   | 29.2 (DV 2/3)
sigma        | 4.5e-3 | 1e-2     | 27.7 | 28.6          | 28.3   | 28.0
TABLE
GPUS=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
FLAGS=(
    --arch "$ARCH" --seed "$SEED"
    --optimizer adam --adam-betas '(0.9, 0.98)' --adam-eps 1e-8 --clip-norm 0 --weight-decay 0.0001
    --lr $LR --lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-7 --max-update 100000
    --dropout 0.4 --criterion label_smoothed_cross_entropy --label-smoothing 0.1
    # 4096 tokens x 8 GPUs x 16 accumulation = 524,288 tokens an update, on however many GPUs there are.
    --max-tokens 4096 --update-freq $((128 / (GPUS > 0 ? GPUS : 1)))
    --best-checkpoint-metric ppl # "checkpoint with best perplexity" [σ, App. F.1]; by default it is the label-smoothed loss
    --keep-last-epochs 5
)
# Mixed precision that keeps fp32 weights, as sigma needs them; --fp16 would hold the weights themselves in half.
if [ "$GPUS" -gt 0 ]; then FLAGS+=(--amp); else FLAGS+=(--cpu); fi
if [ "$SMALL" = 1 ]; then
    LR=$SMALL_LR
    FLAGS+=(
        --encoder-embed-dim 64 --encoder-ffn-embed-dim 128 --encoder-attention-heads 4 --decoder-attention-heads 4
        --lr $LR --warmup-updates 200 --max-update 1500 --dropout 0 --update-freq 1
        --validate-interval-updates 500 --save-interval-updates 500 --keep-interval-updates 3 --no-epoch-checkpoints
    )
    # Two processes with a thread each are nearly twice as fast as one with two on matrices this small.
    if [ "$GPUS" = 0 ]; then FLAGS+=(--max-tokens 1024 --distributed-world-size 2); fi
    export OMP_NUM_THREADS=1
else # shared at width 64, they keep the small model at the unigram level for hundreds of updates
    FLAGS+=(--share-decoder-input-output-embed)
fi

if [ "${DRY_RUN:-0}" != 1 ]; then
    mkdir -p "$OUT"
    echo "$ARCH, seed $SEED, learning rate $LR, $GPUS GPU(s); log and checkpoints in $OUT"
fi
show_or_run fairseq-train "$DATA" --user-dir "$PLUGIN" "${FLAGS[@]}" --num-workers 0 --save-dir "$OUT" \
    --log-format simple --log-interval 20 --log-file "$OUT/train.log" "${@:3}"
if [ "${DRY_RUN:-0}" != 1 ]; then echo "next: $HERE/evaluate.sh $*"; fi
