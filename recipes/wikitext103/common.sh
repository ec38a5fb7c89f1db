# Read by prepare.sh, train.sh and evaluate.sh: where things are, which run is meant, and what SMALL=1 changes.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if [ "$SMALL" = 1 ]; then NAME=wikitext103_small AGAIN="SMALL=1 "; else NAME=wikitext103 AGAIN=; fi
HERE=$AGAIN$(dirname "$0") # how the user calls these scripts
RUNS=${RUNS:-$ROOT/runs}/$NAME
TEXT=$RUNS/text # as downloaded
DATA=$RUNS/data # binarised
PLUGIN=$ROOT/plugins/fairseq_sigma

needs fairseq-train fairseq,recipes

# Blocks of 512, of which the last 256 are scored [σ, App. G.1].
TOKENS=512 CONTEXT=256
if [ "$SMALL" = 1 ]; then
    TOKENS=128 CONTEXT=64
    export OMP_NUM_THREADS=1 # a second thread only slows matrices this small down, and busy cores much more
fi

# run_of MODEL [SEED] [OPTION...]: sets ARCH and OUT from these and from LR, DECAY and DEPTH. Other options are another run:
# fairseq would resume the one that it finds.
run_of() {
    MODEL=${1:-} SEED=${2:-1} DEPTH=${DEPTH:-16}
    # Gradients are clipped to one norm whatever the size of the model: the small one's learning rate is smaller too.
    if [ "$SMALL" = 1 ]; then LR=${LR:-0.1}; else LR=${LR:-1}; fi
    row <<'TABLE' # fairseq's recipe has no decay
MODEL  | USUAL_DECAY
sigma  | 1e-4
preln  | 0
postln | 0
TABLE
    DECAY=${DECAY:-$USUAL_DECAY}
    whole SEED
    local number='^([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]+)?$' zero='^[0.]+(e-?[0-9]+)?$'
    [[ $LR =~ $number && ! $LR =~ $zero ]] || die "LR = $LR: allowed are positive numbers; the paper's are 1, 1.5, 2 and 2.5"
    [[ $DECAY =~ $number ]] || die "DECAY = $DECAY: allowed are numbers from 0; the paper's are 1e-3, 1e-4 and 0"
    one_of DEPTH 16 32
    ARCH=${MODEL}_transformer_lm_wiki103
    if [ "$DEPTH" = 32 ]; then ARCH+=_32l; fi
    local options=${*:3}
    OUT=$RUNS/$(folder_name "$MODEL-$DEPTH-lr$LR-decay$DECAY-$SEED$options")
}
