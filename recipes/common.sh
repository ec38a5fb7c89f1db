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

# one_of NAME WORD...: ends where the variable NAME is none of the words.
one_of() {
    local name=$1 words=${*:2} word
    for word in "${@:2}"; do if [ "$word" = "${!name}" ]; then return; fi; done
    die "$name = ${!name}: allowed are ${words// /, }"
}

# row <<TABLE: the table's first line names variables, columns are apart by bars. Sets them all from the line that begins with the
# first one's value; ends where there is none. Some columns are for the reader alone: what the paper found, what it costs.
row() {
    local IFS='|' names cells known=() i
    read -r -a names
    local key=${names[0]// /}
    while read -r -a cells; do
        known+=("${cells[0]// /}")
        if [ "${known[-1]}" = "${!key}" ]; then
            for i in "${!names[@]}"; do IFS=' ' read -r "${names[i]// /}" <<<"${cells[i]:-}"; done
            return
        fi
    done
    IFS=' ' one_of "$key" "${known[@]}"
}

# whole NAME: ends where the variable NAME is no whole number.
whole() {
    [[ ${!1} =~ ^[0-9]+$ ]] || die "$1 = ${!1}: allowed are whole numbers"
}
one_of SMALL 0 1

# nothing_else ARGUMENT...: ends where there is one, which nobody would read.
nothing_else() {
    [ $# -eq 0 ] || die "$*: no options are allowed here"
}

# needs COMMAND EXTRAS: ends where COMMAND is not installed.
needs() {
    command -v "$1" >/dev/null || die "$1 is not on the path: run 'make venv', or pip install '.[$2]'"
}

# small_data TASK FILE...: sets RAW to the folder of TASK's FILEs that SMALL=1 reads: $STABLE_DATA/TASK, or runs/data/TASK, filled by
# recipes/small_data.py. Ends where RUNS was made of other ones.
small_data() {
    local task=$1 file sum
    shift
    RAW=${STABLE_DATA:-$ROOT/runs/data}/$task
    if [ -z "${STABLE_DATA:-}" ] && [ ! -e "$RAW/$1" ]; then python -m recipes.small_data "$task" || exit 1; fi
    for file in "$@"; do
        [ -s "$RAW/$file" ] || die "$RAW/$file is missing: STABLE_DATA names your folder with $task/; unset, some is fetched"
    done
    mkdir -p "$RUNS"
    sum=$(cd "$RAW" && cksum "$@")
    [ "$(cat "$RUNS/source" 2>/dev/null || echo "$sum")" = "$sum" ] || die "$RUNS is of other data than $RAW: remove it to start over"
    echo "$sum" >"$RUNS/source"
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
