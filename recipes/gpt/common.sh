# Read by the recipes of this folder: where things are, how nanoGPT is run, and what SMALL=1 changes.
#
# What the paper leaves open:
# - Alpha is 0.475 for every GPT, the text's example. Minimum rates are a tenth of the peak for Figure 6 too.
# - init.sh and alpha.sh change GPT-2 in one part, as Section 2 says; --attention=stable --init=stable makes it Figure 3's StableGPT-S.
# - Embeddings are decayed, as nanoGPT has it; Section 2 decays "the weight matrix".
# - The norm is equation 2's, of a token's features; the listing of App. G has the token axis.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
SEEDS=${SEEDS:-0} USER_OPTIONS=("$@")
RUNS=${RUNS:-$ROOT/runs}/gpt$([ "$SMALL" = 1 ] && echo _small || true)

if [ "${DRY_RUN:-0}" = 1 ]; then NANOGPT_DIR=${NANOGPT_DIR:-PATH/TO/nanoGPT}; fi
[ -f "${NANOGPT_DIR:-}/train.py" ] || [ "${DRY_RUN:-0}" = 1 ] ||
    die "NANOGPT_DIR=${NANOGPT_DIR:-}: a checkout of github.com/karpathy/nanoGPT is needed"
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())') || die "torch is missing: run 'make venv', or pip install ."

if [ "$SMALL" = 1 ]; then
    # 4 blocks of width 128 on the characters of Shakespeare: half a minute on one core.
    DATA=${DATA_DIR:-$RUNS/data}
    ITERS=${ITERS:-300}
    SMALL_OPTIONS=(--dataset="$DATA" --device=cpu --dtype=float32 --compile=False --n_layer=4 --n_head=4 --n_embd=128 --block_size=128
        --batch_size=16 --gradient_accumulation_steps=1 --max_iters="$ITERS" --lr_decay_iters="$ITERS" --eval_interval=100
        --eval_iters=20 --monitor_every=10)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    if [ ! -f "$DATA/meta.pkl" ] && [ "${DRY_RUN:-0}" = 0 ]; then python -m recipes.gpt.prepare --output "$DATA"; fi
else
    SMALL_OPTIONS=()
fi

# rate LEARNING_RATE: it, and a minimum of a tenth of it.
rate() {
    echo "--learning_rate=$1 --min_lr=$(python -c "print($1 / 10)")"
}

# train NAME "CONFIG ..." OPTION...: one run for each of SEEDS. Later configs and options win: after these come those of SMALL=1, and the user's
# last. An interrupted run goes on, a finished one is left alone.
train() {
    local name=$1 configs=() launch=(python) seed out resume
    for config in $2; do configs+=("config/$config.py"); done
    shift 2
    [ "$SMALL$((${DRY_RUN:-0}))" != 00 ] || [ -f "$NANOGPT_DIR/data/openwebtext/train.bin" ] ||
        die "$NANOGPT_DIR/data/openwebtext/train.bin is missing: run data/openwebtext/prepare.py of the checkout (54 GB)"
    if [ "$SMALL" = 0 ] && [ "$GPUS" -gt 1 ]; then launch=(torchrun --standalone --nproc_per_node="$GPUS"); fi
    for seed in $SEEDS; do
        out=$RUNS/$name-$seed resume=()
        if [ -f "$out/ckpt.pt" ]; then resume=(--init_from=resume); fi
        local command=("${launch[@]}" -m nanogpt_patch "$NANOGPT_DIR/train.py" "${configs[@]}" "$@" "${SMALL_OPTIONS[@]}" "${USER_OPTIONS[@]}"
            --extra_seed="$seed" --out_dir="$out" "${resume[@]}")
        if [ "${DRY_RUN:-0}" = 1 ]; then
            printf '%q ' "${command[@]}" && echo && continue
        fi
        if [ -f "$out/done" ]; then continue; fi
        mkdir -p "$out"
        echo "$name, seed $seed: log in $out/train.log"
        "${command[@]}" >>"$out/train.log" || die "$name, seed $seed, failed: the end of $out/train.log says why"
        touch "$out/done"
    done
}

# compare NAME: every run of this recipe, side by side, in NAME.jsonl and NAME.png.
compare() {
    [ "${DRY_RUN:-0}" = 1 ] || python -m recipes.gpt.compare --output "$RUNS/$1" "$RUNS/$1"_*/
}
