#!/usr/bin/env bash
# evaluate.sh RUN: word error rates of the checkpoint with the best validation WER, greedy decoding, no language model.
# RUN is the folder that train.sh names; CHECKPOINT is another checkpoint of it. SMALL=1: of the last one, which has seen the
# training utterances longest, on these too. DRY_RUN=1 shows the command.
source "$(dirname "$0")/common.sh"
nothing_else "${@:2}"
[ $# -ge 1 ] || die "give the RUN folder that train.sh named"
BEST=best && [ "$SMALL" = 1 ] && BEST=last
OUT=$1 CHECKPOINT=${CHECKPOINT:-$1/checkpoint_$BEST.pt}
[ -s "$CHECKPOINT" ] || [ "${DRY_RUN:-0}" = 1 ] || die "$CHECKPOINT is missing: run $HERE/train.sh first"
SPLITS=(dev-clean dev-other test-clean test-other) && [ "$SMALL" = 1 ] && SPLITS=(train valid test)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$([ "$SMALL" = 1 ] && echo 1 || nproc)}
COMMAND=(python -m fairseq_sigma.transcribe "$CHECKPOINT" --manifest "$MANIFEST" --split "${SPLITS[@]}")
if [ "${DRY_RUN:-0}" = 1 ]; then show_or_run "${COMMAND[@]}" && exit; fi
# It ends with 1 where some utterances were of no use, which it names; the rates count all of their words as wrong.
"${COMMAND[@]}" >"$OUT/heard.tsv" 2>"$OUT/heard.err" || true
grep 'WER .* %, CER' "$OUT/heard.tsv" | tee "$OUT/wer.txt" || die "transcribing failed: $(tail -n 1 "$OUT/heard.err")"
echo "what it heard is in $OUT/heard.tsv"
