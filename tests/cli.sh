# tests/cli.sh - what the tests of the examples' command lines share. Sourced with
# `program`, the example, and `dir`, a folder for its files, from the top folder.
rm -rf "$dir"
mkdir -p "$dir"
LC_ALL=C
export LC_ALL
passed=0
failed=0

ok() {   # ok NAME COMMAND...: the command succeeds
  name=$1
  shift
  if "$@" > $dir/ok.out 2>&1; then passed=$((passed + 1)); else
    failed=$((failed + 1))
    echo "FAILED $name: $*"
    head -n 5 $dir/ok.out
  fi
}

# refused NAME STATUS TEXT ARGUMENTS...: the program exits with STATUS (a list such as
# "1 2") and prints one line on stderr that contains TEXT, and nothing on stdout
refused() {
  name=$1 want=$2 text=$3
  shift 3
  "$program" "$@" > $dir/refused.out 2> $dir/refused.err < /dev/null
  status=$?
  lines=$(grep -c '' $dir/refused.err)
  good=no
  for s in $want; do if [ $status = "$s" ]; then good=yes; fi; done
  if [ $good = yes ] && [ "$lines" = 1 ] && [ ! -s $dir/refused.out ] \
     && grep -qi -e "$text" $dir/refused.err; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    echo "FAILED $name: ${program##*/} $*"
    echo "  status $status, wanted $want; wanted one line with '$text', got:"
    head -n 5 $dir/refused.err $dir/refused.out
  fi
}

# lost NAME ARGUMENTS...: what is printed cannot be written, which is told in one line
lost() {
  name=$1
  shift
  if [ ! -c /dev/full ]; then echo "skipped $name: no /dev/full"; return; fi
  "$program" "$@" > /dev/full 2> $dir/lost.err < /dev/null
  status=$?
  ok "$name" test $status = 1 -a "$(wc -l < $dir/lost.err)" = 1
  ok "$name: the line" grep -q 'cannot write to stdout' $dir/lost.err
}

# nan_weights MODEL: its header, and only NaN behind it
nan_weights() {
  n=$((8 + $(od -An -tu4 -N4 "$1")))
  head -c $n "$1"
  tail -c +$((n + 1)) "$1" | tr '\000-\377' '[\377*]'
}

same() { cmp -s "$1" "$2"; }
differ() { ! cmp -s "$1" "$2"; }
# the columns of a log that do not depend on the clock
same_log() { cut -d, -f1-5 "$1" > $dir/a.csv; cut -d, -f1-5 "$2" > $dir/b.csv
             cmp -s $dir/a.csv $dir/b.csv; }
# field NAME of a flat summary.json
field() { tr ',{}' '\n\n\n' < "$2" | sed -n "s/^[ \"]*$1\"[ ]*:[ ]*\"*\([^\" ]*\).*/\1/p"; }
same_run() { same "$1/model.safetensors" "$2/model.safetensors" \
             && same_log "$1/log.csv" "$2/log.csv" && same "$1/weights.csv" "$2/weights.csv"; }

if [ ! -x "$program" ]; then
  echo "FAILED: no ${program##*/}: make it first"
  echo "0 passed, 1 failed"
  exit 1
fi
