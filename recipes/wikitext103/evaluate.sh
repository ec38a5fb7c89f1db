#!/usr/bin/env bash
# [LR=1] [DECAY=1e-4] [DEPTH=16] evaluate.sh MODEL [SEED] [train.sh's options]: perplexity on valid and test of the best
# checkpoint of that run: the last 256 tokens of each window of 512 are scored, windows 256 apart [σ, App. G.1].
# fairseq-eval-lm folds sigma away.
source "$(dirname "$0")/common.sh"
run_of "$@"
CHECKPOINT=${CHECKPOINT:-$OUT/checkpoint_best.pt}
[ -s "$CHECKPOINT" ] || [ "${DRY_RUN:-0}" = 1 ] ||
    die "$CHECKPOINT is missing: run $HERE/train.sh $* with this LR, DECAY and DEPTH first"
CPU=() && [ "$(python -c 'import torch; print(torch.cuda.is_available())')" = False ] && CPU=(--cpu)

for split in valid test; do
    COMMAND=(fairseq-eval-lm "$DATA" --user-dir "$PLUGIN" --path "$CHECKPOINT" --gen-subset $split --batch-size 4 "${CPU[@]}"
        --tokens-per-sample $TOKENS --context-window $CONTEXT --num-workers 0 --no-progress-bar)
    if [ "${DRY_RUN:-0}" = 1 ]; then show_or_run "${COMMAND[@]}" && continue; fi
    # Where fairseq logs to depends on who set up logging first.
    LOG=$OUT/eval-$split.log
    "${COMMAND[@]}" >"$LOG" 2>&1 || die "fairseq-eval-lm failed: $(tail -n 1 "$LOG")"
    perplexity=$(grep -o 'Perplexity: [0-9.]*' "$LOG" | grep -o '[0-9.]*$') || die "$LOG has no perplexity"
    echo "$(basename "$OUT") $split: perplexity $perplexity" | tee "$OUT/perplexity-$split.txt"
done
