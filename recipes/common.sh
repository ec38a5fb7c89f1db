# Read by the shell recipes: where things are, how they end with a line, and what SMALL and DRY_RUN allow.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -d "$ROOT/${STABLE_VENV:-.venv}" ]; then export PATH="$ROOT/${STABLE_VENV:-.venv}/bin:$PATH"; fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
SMALL=${SMALL:-0}

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}
case "$SMALL" in 0 | 1) ;; *) die "SMALL=$SMALL: allowed are 0 and 1" ;; esac

# needs COMMAND EXTRAS: ends where COMMAND is not installed.
needs() {
    command -v "$1" >/dev/null || die "$1 is not on the path: run 'make venv', or pip install '.[$2]'"
}

# folder_name OPTIONS: what a folder of their own is called. Names end at 255 letters: a long one ends in a sum of all.
folder_name() {
    local name=${1//[^[:alnum:].,=_-]/_}
    if [ ${#name} -gt 255 ]; then name=${name:0:240}-$(cksum <<<"$1" | cut -d" " -f1); fi
    echo "$name"
}

# would_write PATH...: in a dry run, what a preparation would write, and its end.
would_write() {
    if [ "${DRY_RUN:-0}" = 1 ]; then echo "$(basename "$0") would write $*" && exit; fi
}

# show_or_run COMMAND...: DRY_RUN=1 shows the command.
show_or_run() {
    if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "$@" && echo; else "$@"; fi
}
