#!/usr/bin/env bash
# prepare.sh: downloads, tokenises, segments and binarises WMT'17 English-German [σ, App. F].
# SMALL=1 prepare.sh: the same from the short sentences of `python -m recipes.small_data mt`, with sentencepiece.
# A step whose output is there is not done again; remove runs/wmt17_en_de* to start over.
source "$(dirname "$0")/common.sh"
nothing_else "$@"
would_write "$TEXT" "$DATA"
mkdir -p "$TEXT"

once() { # once FILE COMMAND...: the command's output becomes FILE, whole or not at all
    local out=$1
    shift
    if [ ! -s "$out" ]; then
        echo "  $(basename "$out")"
        "$@" >"$out.part" || die "$out could not be made: $* failed"
        mv "$out.part" "$out"
    fi
}

binarise() {
    if [ ! -s "$DATA/test.en-de.de.idx" ]; then
        rm -rf "$DATA"
        fairseq-preprocess --source-lang en --target-lang de --joined-dictionary --workers "$(nproc)" \
            --trainpref "$TEXT/train" --validpref "$TEXT/valid" --testpref "$TEXT/test" --destdir "$DATA" >"$TEXT/preprocess.log" 2>&1 ||
            die "fairseq-preprocess failed, see $TEXT/preprocess.log"
    fi
    echo "ready: $(wc -l <"$TEXT/train.en") training pairs and $(($(wc -l <"$DATA/dict.en.txt") + 4)) subwords in $DATA"
    echo "next: $HERE/train.sh sigma_transformer_18l"
}

if [ "$SMALL" = 1 ]; then
    small_data mt {train,valid,test}.{en,de}
    echo "pairs of at most 8 words a side from $RAW"
    short() {
        paste -d '\t' "$RAW/$1.en" "$RAW/$1.de" | awk -F '\t' 'split($1, _, " ") <= 8 && split($2, _, " ") <= 8'
    }
    for split in train valid test; do
        once "$TEXT/$split.short" short $split
        once "$TEXT/$split.ref.en" cut -f1 "$TEXT/$split.short"
        once "$TEXT/$split.ref.de" cut -f2 "$TEXT/$split.short"
    done
    if [ ! -s "$TEXT/spm.model" ]; then
        python - "$TEXT" 2>"$TEXT/spm.log" <<'PY' || die "no vocabulary could be learned, see $TEXT/spm.log"
import sys
import sentencepiece
text = sys.argv[1]
files = f"{text}/train.ref.en,{text}/train.ref.de"
sentencepiece.SentencePieceTrainer.train(input=files, model_prefix=f"{text}/spm.part", vocab_size=2000, hard_vocab_limit=False)
PY
        mv "$TEXT/spm.part.model" "$TEXT/spm.model"
    fi
    encode() {
        python -c 'import sys, sentencepiece as s; e = s.SentencePieceProcessor(model_file=sys.argv[1]).encode
for line in sys.stdin: print(*e(line.strip(), out_type=str))' "$TEXT/spm.model" <"$TEXT/$1"
    }
    for split in train valid test; do
        for l in en de; do once "$TEXT/$split.$l" encode "$split.ref.$l"; done
    done
    binarise
    exit
fi

# As fairseq's examples/translation/prepare-wmt14en2de.sh, the preprocessing of the paper; its Moses and subword-nmt
# scripts are the packages sacremoses and subword-nmt.
declare -A CORPORA=(
    [training/europarl-v7.de-en]=https://www.statmt.org/wmt13/training-parallel-europarl-v7.tgz
    [commoncrawl.de-en]=https://www.statmt.org/wmt13/training-parallel-commoncrawl.tgz
    [training/news-commentary-v12.de-en]=https://data.statmt.org/wmt17/translation-task/training-parallel-nc-v12.tgz
)
mkdir -p "$TEXT/orig"
for corpus in "${!CORPORA[@]}"; do
    url=${CORPORA[$corpus]} tgz=$TEXT/orig/$(basename "${CORPORA[$corpus]}")
    if [ ! -s "$tgz" ]; then
        curl --fail --location --continue-at - --output "$tgz.part" "$url" || die "$url could not be downloaded"
        mv "$tgz.part" "$tgz"
    fi
    if [ ! -s "$TEXT/orig/$corpus.de" ]; then # unpacked aside, so that what is there is whole
        rm -rf "$TEXT/orig/part" && mkdir -p "$TEXT/orig/part" "$(dirname "$TEXT/orig/$corpus")"
        tar -xzf "$tgz" -C "$TEXT/orig/part"
        mv "$TEXT/orig/part/$corpus".* "$(dirname "$TEXT/orig/$corpus")"
        rm -r "$TEXT/orig/part"
    fi
done

# A lone carriage return inside a line would be a line end to sacremoses, and shift one side against the other.
tokenise() { tr -d '\r' | sacremoses -q -l "$1" -j "$(nproc)" normalize -c tokenize -a; }
train_tokens() { cat "$TEXT"/orig/{training/europarl-v7,commoncrawl,training/news-commentary-v12}.de-en."$1" | tokenise "$1"; }
test_tokens() { sacrebleu -t "$1" -l en-de --echo "$2" | tokenise "$3"; }
for l in en de; do
    once "$TEXT/tok.train.$l" train_tokens $l
    side=src && [ $l = de ] && side=ref
    once "$TEXT/tok.valid.$l" test_tokens wmt16 $side $l # newstest2016
    once "$TEXT/tok.test.$l" test_tokens wmt17 $side $l  # newstest2017
done
[ "$(wc -l <"$TEXT/tok.train.en")" = "$(wc -l <"$TEXT/tok.train.de")" ] || die "$TEXT/tok.train.*: not as many lines in each language"
once "$TEXT/valid.ref.de" sacrebleu -t wmt16 -l en-de --echo ref
once "$TEXT/test.ref.de" sacrebleu -t wmt17 -l en-de --echo ref
learn() { cat "$TEXT"/tok.train.{en,de} | subword-nmt learn-bpe -s 40000; }
once "$TEXT/codes" learn
segment() { subword-nmt apply-bpe -c "$TEXT/codes" <"$TEXT/tok.$1.$2"; }
for l in en de; do
    once "$TEXT/bpe.train.$l" segment train $l
    once "$TEXT/valid.$l" segment valid $l
    once "$TEXT/test.$l" segment test $l
done
# Moses' clean-corpus-n.perl -ratio 1.5 1 250: pairs of 1 to 250 subwords, neither side 1.5 times longer than the other.
clean() {
    paste -d '\t' "$TEXT"/bpe.train.{en,de} | awk -F '\t' '{ a = split($1, _, " "); b = split($2, _, " ")
        if (a && b && a <= 250 && b <= 250 && a <= 1.5 * b && b <= 1.5 * a) print }'
}
once "$TEXT/clean.train" clean
once "$TEXT/train.en" cut -f1 "$TEXT/clean.train"
once "$TEXT/train.de" cut -f2 "$TEXT/clean.train"
binarise
