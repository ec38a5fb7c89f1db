# Read by prepare.sh, train.sh and evaluate.sh: where things are, and what SMALL=1 changes.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -d "$ROOT/.venv" ]; then export PATH="$ROOT/.venv/bin:$PATH"; fi
SMALL=${SMALL:-0} HOURS=${HOURS:-100}
if [ "$SMALL" = 1 ]; then NAME=librispeech_small AGAIN="SMALL=1 "; else NAME=librispeech_$HOURS AGAIN="HOURS=$HOURS "; fi
HERE=$AGAIN$(dirname "$0") # how the user calls these scripts
RUNS=${RUNS:-$ROOT/runs}/$NAME
MANIFEST=$RUNS/manifest.tsv
PLUGIN=$ROOT/plugins/fairseq_sigma

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}
command -v fairseq-train >/dev/null || die "fairseq-train is not on the path: run 'make venv', or pip install '.[fairseq,recipes]'"
case "$SMALL" in 0 | 1) ;; *) die "SMALL=$SMALL: allowed are 0 and 1" ;; esac
case "$HOURS" in 100 | 960) ;; *) die "HOURS=$HOURS: allowed are 100 and 960" ;; esac

# show_or_run COMMAND...: DRY_RUN=1 shows the command.
show_or_run() {
    if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "$@" && echo; else "$@"; fi
}
