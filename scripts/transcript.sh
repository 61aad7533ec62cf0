#!/usr/bin/env bash
# Walk the README's road as a new user would, and write every line that was printed to a page:
#   bash scripts/transcript.sh MODEL CALIBRATION HELD_OUT [OUT]      # OUT: docs/transcript.md
# MODEL is a checkpoint folder or hub id, CALIBRATION and HELD_OUT texts. GROUPS_WANTED (1), STEPS (60), SEQUENCES (32),
# LENGTH (512) and WINDOWS (8) say how much is spent; ONLY="demo plan" walks only those steps. The commands of the
# environment that is active are run: `pip install .`, or PYTHON_BIN=/path/to/venv/bin.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -lt 3 ]; then sed -n '2,6s/^# //p' "$0"; exit 2; fi
absolute() { if [ -e "$1" ] || [ -n "${2:-}" ]; then (cd "$(dirname "$1")" && echo "$PWD/$(basename "$1")"); else echo "$1"; fi; }
model=$(absolute "$1"); calibration=$(absolute "$2"); held_out=$(absolute "$3")
out=$(absolute "${4:-$root/docs/transcript.md}" new)
groups=${GROUPS_WANTED:-1}
[ -z "${PYTHON_BIN:-}" ] || PATH="$PYTHON_BIN:$PATH"
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
# Short names, which stand in the page too.
link() { if [ -e "$1" ]; then ln -s "$1" "$2"; echo "$2"; else echo "$1"; fi; }
model=$(link "$model" model); calibration=$(link "$calibration" texts.jsonl); held_out=$(link "$held_out" held-out.jsonl)
cores=$(OMP_NUM_THREADS='' nproc)
page="$work/page.md"; total=$SECONDS
export COLUMNS=110 NO_COLOR=1 HF_HUB_DISABLE_PROGRESS_BARS=1

{
  echo "# A new user's road, as it was printed"
  echo
  echo "Written by \`bash scripts/transcript.sh MODEL CALIBRATION HELD_OUT\` on $(date -u +%Y-%m-%d): $cores core$([ "$cores" = 1 ] || echo s) of"
  echo "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1), no GPU asked for;"
  python -c 'import sys; from importlib.metadata import version as v
print("Python " + sys.version.split()[0] + ", " + ", ".join(f"{n} {v(n)}" for n in ("gqa-convert", "torch", "transformers")) + ".")'
  echo "MODEL is $(basename "$1"). Times are those of the wall."
} > "$page"

step() {  # step NAME TITLE COMMAND...
  local name=$1 title=$2; shift 2
  case " ${ONLY:-$name} " in *" $name "*) ;; *) return 0 ;; esac
  local started=$SECONDS code=0 shown='$' word
  for word in "$@"; do case $word in *[\ \(]*) word="'$word'" ;; esac; shown+=" $word"; done
  { echo; echo "## $title"; echo; echo '```console'; echo "$shown"; } >> "$page"
  echo "$shown" >&2
  "$@" < /dev/null > "$work/printed" 2>&1 || code=$?
  sed "s|.*\r||; s|$work/||g; s|$root/||g; s| *$||" "$work/printed" >> "$page"
  { echo '```'; echo; echo "$((SECONDS - started)) s$([ $code = 0 ] || echo ", exit code $code")"; } >> "$page"
  [ $code = 0 ] || { cat "$work/printed" >&2; failed=1; }
}
failed=0 usable=

step demo "What it is" gqa demo
step inspect "Look at the model" gqa inspect "$model"
step plan "Plan" gqa plan "$model" --groups "$groups"
step convert "The instant conversion" gqa-convert --groups "$groups" "$model" --out by-mean
step best "A better merge" gqa-convert --groups "$groups" "$model" --out by-best --preset best \
  --calibrate "$calibration" --calibration-sequences "${SEQUENCES:-32}" --calibration-length "${LENGTH:-512}" \
  --refit-steps "${STEPS:-60}"
[ ! -d by-best ] || usable="a better merge than the mean was there after $((SECONDS - total)) s; "
step eval "What it costs" gqa eval "$model" by-mean by-best --data "$held_out" --context 512 \
  --max-windows "${WINDOWS:-8}" --samples 2 --out run/eval.json
step report "The page" gqa report run
step heal "What mending the rest would take" gqa heal by-best "$model" --text "$calibration" --out healed --dry-run
step use "Use it: nothing of this package is needed" python -c 'from transformers import pipeline
print(pipeline("text-generation", "by-best")("The capital of France is", max_new_tokens=12, do_sample=False))'

{ echo; echo "With the package installed: ${usable}all of it took $((SECONDS - total)) s."; } >> "$page"
cp "$page" "$out"
echo "wrote $out" >&2
exit $failed
