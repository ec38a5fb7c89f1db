# Read by prepare.sh, train.sh and evaluate.sh: where things are, and what SMALL=1 changes.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HOURS=${HOURS:-100}
if [ "$SMALL" = 1 ]; then NAME=librispeech_small AGAIN="SMALL=1 "; else NAME=librispeech_$HOURS AGAIN="HOURS=$HOURS "; fi
HERE=$AGAIN$(dirname "$0") # how the user calls these scripts
RUNS=${RUNS:-$ROOT/runs}/$NAME
MANIFEST=$RUNS/manifest.tsv
PLUGIN=$ROOT/plugins/fairseq_sigma

needs fairseq-train fairseq,recipes
one_of HOURS 100 960
