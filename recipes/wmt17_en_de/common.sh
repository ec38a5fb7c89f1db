# Read by prepare.sh, train.sh and evaluate.sh: where things are, which run is meant, and what SMALL=1 changes.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if [ "$SMALL" = 1 ]; then NAME=wmt17_en_de_small AGAIN="SMALL=1 "; else NAME=wmt17_en_de AGAIN=; fi
HERE=$AGAIN$(dirname "$0") # how the user calls these scripts
RUNS=${RUNS:-$ROOT/runs}/$NAME
TEXT=$RUNS/text # the raw and the segmented text
DATA=$RUNS/data # binarised
PLUGIN=$ROOT/plugins/fairseq_sigma

needs fairseq-train fairseq,recipes

# run_of ARCH [SEED] [OPTION...]: sets ARCH, SEED and OUT. Other options are another run: fairseq would resume the
# one that it finds.
run_of() {
    ARCH=$1 SEED=${2:-1}
    whole SEED
    local options=${*:3}
    OUT=$RUNS/$(folder_name "$ARCH-$SEED$options")
}
