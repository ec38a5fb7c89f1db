#!/usr/bin/env bash
# prepare.sh: downloads LibriSpeech and writes the manifest of HOURS=100 (the default) or 960 hours [σ, App. E].
# SMALL=1 prepare.sh: a manifest of the recordings in $STABLE_DATA/asr.
# An archive that is there is not downloaded again, nor unpacked twice; ARCHIVES is where they are kept.
source "$(dirname "$0")/common.sh"
would_write "$MANIFEST"
if [ "$SMALL" = 1 ]; then
    ASR=${STABLE_DATA:-$ROOT/../shared/data}/asr
    [ -s "$ASR/manifest.tsv" ] || die "$ASR/manifest.tsv is missing: set STABLE_DATA to a folder that has asr/manifest.tsv"
    mkdir -p "$RUNS"
    awk -F '\t' -v OFS='\t' -v folder="$(cd "$ASR" && pwd)" 'NR > 1 { $2 = folder "/" $2 } { print }' "$ASR/manifest.tsv" >"$MANIFEST.part"
    mv "$MANIFEST.part" "$MANIFEST"
else
    python "$(dirname "$0")/prepare.py" "$HOURS" "${ARCHIVES:-$(dirname "$RUNS")/librispeech}" "$MANIFEST" || exit 1
fi
echo "ready: $(awk -F '\t' 'NR > 1 && $1 == "train"' "$MANIFEST" | wc -l) training utterances in $MANIFEST"
echo "next: $HERE/train.sh sigma_postln"
