#!/usr/bin/env bash
# prepare.sh: downloads LibriSpeech and writes the manifest of HOURS=100 (the default) or 960 hours [σ, App. E].
# SMALL=1 prepare.sh: a manifest of the recordings of `python -m recipes.small_data asr`, or of $STABLE_DATA/asr/manifest.tsv.
# An archive that is there is not downloaded again, nor unpacked twice; ARCHIVES is where they are kept.
source "$(dirname "$0")/common.sh"
nothing_else "$@"
would_write "$MANIFEST"
if [ "$SMALL" = 1 ]; then
    small_data asr manifest.tsv
    awk -F '\t' -v OFS='\t' -v folder="$(cd "$RAW" && pwd)" 'NR > 1 && $2 !~ /^\// { $2 = folder "/" $2 } { print }' \
        "$RAW/manifest.tsv" >"$MANIFEST.part"
    mv "$MANIFEST.part" "$MANIFEST"
else
    python "$(dirname "$0")/prepare.py" "$HOURS" "${ARCHIVES:-$(dirname "$RUNS")/librispeech}" "$MANIFEST" || exit 1
fi
echo "ready: $(awk -F '\t' 'NR > 1 && $1 == "train"' "$MANIFEST" | wc -l) training utterances in $MANIFEST"
echo "next: $HERE/train.sh sigma_postln"
