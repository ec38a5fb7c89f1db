#!/usr/bin/env bash
# evaluate.sh ARCH [SEED] [train.sh's options]: BLEU of the checkpoint with the best validation perplexity, beam 5, on valid and
# test: fairseq's own (on tokens, the paper's figure) and sacrebleu's (on plain text, the comparable one). DRY_RUN=1 shows the
# commands.
source "$(dirname "$0")/common.sh"
[ $# -ge 1 ] || die "give the ARCH that train.sh was given"
run_of "$@"
CHECKPOINT=${CHECKPOINT:-$OUT/checkpoint_best.pt}
[ -s "$CHECKPOINT" ] || [ "${DRY_RUN:-0}" = 1 ] || die "$CHECKPOINT is missing: run $HERE/train.sh $* first"
BPE=(--remove-bpe) && [ "$SMALL" = 1 ] && BPE=(--remove-bpe sentencepiece)
CPU=() && [ "$(python -c 'import torch; print(torch.cuda.is_available())')" = False ] && CPU=(--cpu)

detokenise() { if [ "$SMALL" = 1 ]; then cat; else sacremoses -q -l de detokenize; fi; }
for split in valid test; do
    COMMAND=(fairseq-generate "$DATA" --user-dir "$PLUGIN" --path "$CHECKPOINT" --gen-subset $split --beam 5
        --max-tokens 8000 "${BPE[@]}" "${CPU[@]}" --no-progress-bar)
    if [ "${DRY_RUN:-0}" = 1 ]; then show_or_run "${COMMAND[@]}" && continue; fi
    "${COMMAND[@]}" >"$OUT/generate-$split.log" 2>"$OUT/generate-$split.err" ||
        die "fairseq-generate failed: $(tail -n 1 "$OUT/generate-$split.err")"
    grep '^H-' "$OUT/generate-$split.log" | sed 's/^H-//' | sort -n | cut -f3 | detokenise >"$OUT/$split.hyp.de"
    [ "$(wc -l <"$OUT/$split.hyp.de")" = "$(wc -l <"$TEXT/$split.ref.de")" ] || die "$split: not every sentence came out"
    fairseq_bleu=$(grep -ho 'BLEU4\? = [0-9.]*' "$OUT/generate-$split.log" | tail -n 1 | grep -o '[0-9.]*$')
    sacre_bleu=$(sacrebleu "$TEXT/$split.ref.de" -i "$OUT/$split.hyp.de" -m bleu -b -w 2)
    echo "$(basename "$OUT") $split: BLEU $fairseq_bleu (fairseq), $sacre_bleu (sacrebleu)" | tee "$OUT/bleu-$split.txt"
done
if [ "${DRY_RUN:-0}" != 1 ]; then echo "translations are in $OUT/test.hyp.de"; fi
