# Read by prepare.sh, train.sh and evaluate.sh: where things are, which run is meant, and what SMALL=1 changes.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -d "$ROOT/.venv" ]; then export PATH="$ROOT/.venv/bin:$PATH"; fi
SMALL=${SMALL:-0}
if [ "$SMALL" = 1 ]; then NAME=wmt17_en_de_small AGAIN="SMALL=1 "; else NAME=wmt17_en_de AGAIN=; fi
HERE=$AGAIN$(dirname "$0") # how the user calls these scripts
RUNS=${RUNS:-$ROOT/runs}/$NAME
TEXT=$RUNS/text # the raw and the segmented text
DATA=$RUNS/data # binarised
PLUGIN=$ROOT/plugins/fairseq_sigma

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}
command -v fairseq-train >/dev/null || die "fairseq-train is not on the path: run 'make venv', or pip install '.[fairseq,recipes]'"
case "$SMALL" in 0 | 1) ;; *) die "SMALL=$SMALL: allowed are 0 and 1" ;; esac

# run_of ARCH [SEED] [OPTION...]: sets ARCH, SEED and OUT. Other options are another run: fairseq would resume the
# one that it finds.
run_of() {
    ARCH=$1 SEED=${2:-1}
    [[ $SEED =~ ^[0-9]+$ ]] || die "SEED = $SEED: allowed are whole numbers"
    local options=${*:3}
    OUT=$RUNS/$ARCH-$SEED${options//[^[:alnum:].,=_-]/_}
}

# show_or_run COMMAND...: DRY_RUN=1 shows the command.
show_or_run() {
    if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "$@" && echo; else "$@"; fi
}
