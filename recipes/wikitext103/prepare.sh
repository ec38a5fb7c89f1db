#!/usr/bin/env bash
# prepare.sh: downloads WikiText-103 and binarises it [σ, App. G].
# SMALL=1 prepare.sh: the same from `python -m recipes.small_data lm`, words that are there 10 times or more.
# A step whose output is there is not done again; remove runs/wikitext103* to start over.
source "$(dirname "$0")/common.sh"
nothing_else "$@"
would_write "$TEXT" "$DATA"
mkdir -p "$TEXT"

if [ "$SMALL" = 1 ]; then
    small_data lm {train,valid,test}.txt
    VOCABULARY=(--thresholdsrc 10)
    for split in train valid test; do
        # Punctuation becomes words, as in WikiText.
        LC_ALL=C sed 's/[[:punct:]]/ & /g' "$RAW/$split.txt" >"$TEXT/wiki.$split.tokens.part"
        mv "$TEXT/wiki.$split.tokens.part" "$TEXT/wiki.$split.tokens"
    done
else
    # fairseq's own script has the first address of the archive, which is gone; this is its author's, of the same bytes.
    ARCHIVE=wikitext-103-v1.zip VOCABULARY=()
    URL=https://wikitext.smerity.com/$ARCHIVE
    SHA256=242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590
    if [ ! -s "$TEXT/wiki.train.tokens" ]; then
        if [ ! -s "$TEXT/$ARCHIVE" ]; then
            curl --fail --location --continue-at - --output "$TEXT/$ARCHIVE.part" "$URL" ||
                die "$URL could not be downloaded; if you have $ARCHIVE, put it into $TEXT"
            mv "$TEXT/$ARCHIVE.part" "$TEXT/$ARCHIVE"
        fi
        found=$(sha256sum "$TEXT/$ARCHIVE" | cut -d ' ' -f 1)
        [ "$found" = $SHA256 ] ||
            die "$TEXT/$ARCHIVE has SHA-256 $found, the official archive $SHA256: remove it and start again"
        rm -rf "$TEXT/part" && python -m zipfile -e "$TEXT/$ARCHIVE" "$TEXT/part"
        for split in test valid train; do mv "$TEXT/part/wikitext-103/wiki.$split.tokens" "$TEXT"; done
        rm -r "$TEXT/part"
    fi
fi

if [ ! -s "$DATA/test.idx" ]; then
    rm -rf "$DATA"
    fairseq-preprocess --only-source --workers "$(nproc)" "${VOCABULARY[@]}" --destdir "$DATA" \
        --trainpref "$TEXT/wiki.train.tokens" --validpref "$TEXT/wiki.valid.tokens" --testpref "$TEXT/wiki.test.tokens" \
        >"$TEXT/preprocess.log" 2>&1 ||
        die "fairseq-preprocess failed, see $TEXT/preprocess.log"
fi
echo "ready: $(wc -w <"$TEXT/wiki.train.tokens") training words and a vocabulary of $(($(wc -l <"$DATA/dict.txt") + 4)) in $DATA"
echo "next: $HERE/train.sh sigma"
