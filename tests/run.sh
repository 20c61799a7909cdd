#!/bin/sh
# Runs tests, each of which prints `N passed, N failed` as its last line.
#   sh tests/run.sh one PROGRAM    runs a program or script; its log and its counts go to
#                                  build/tests/NAME.log and NAME.result
#   sh tests/run.sh sum NAME...    prints what failed, and the sum as the last line
# A test that crashes, ends without that line, or does not even compile counts as a
# failure; so does a run of no tests at all.
dir=build/tests

one() {
  program=$1
  name=$(basename "$program" .sh)
  log=$dir/$name.log
  mkdir -p $dir build/tmp
  # Waiting threads sleep: tests share their processors. A make in a test is its own.
  OMP_WAIT_POLICY=passive
  export OMP_WAIT_POLICY
  unset MAKEFLAGS MAKELEVEL MFLAGS
  start=$(date +%s)
  case $program in
    *.sh) sh "$program" > "$log" 2>&1 < /dev/null ;;
    *) "$program" > "$log" 2>&1 < /dev/null ;;
  esac
  status=$?
  seconds=$(($(date +%s) - start))
  line=$(tail -n 1 "$log")
  p=$(printf '%s\n' "$line" | sed -n 's/^\([0-9][0-9]*\) passed, [0-9][0-9]* failed$/\1/p')
  f=$(printf '%s\n' "$line" | sed -n 's/^[0-9][0-9]* passed, \([0-9][0-9]*\) failed$/\1/p')
  s=$(grep -c '^skipped ' "$log")
  if [ -z "$p" ]; then
    echo "FAILED $name: it ended with status $status and without a count" >> "$log"
    p=0
    f=1
  elif [ "$f" = 0 ] && [ "$status" != 0 ]; then
    echo "FAILED $name: it ended with status $status" >> "$log"
    f=1
  fi
  note=""
  if [ "$s" != 0 ]; then note=", $s skipped"; fi
  printf '%-20s %4d passed, %d failed%s (%d s)\n' "$name" "$p" "$f" "$note" "$seconds"
  echo "$p $f" > $dir/$name.result
}

sum() {
  passed=0
  failed=0
  for name in "$@"; do
    if [ -s $dir/$name.result ]; then
      read -r p f < $dir/$name.result
    else
      echo "FAILED $name: it was not built"
      p=0
      f=1
    fi
    if [ "$f" != 0 ] && [ -f $dir/$name.log ]; then
      echo "--- $name"
      cat $dir/$name.log
    elif [ -f $dir/$name.log ]; then
      grep '^skipped ' $dir/$name.log
    fi
    passed=$((passed + p))
    failed=$((failed + f))
  done
  if [ $((passed + failed)) = 0 ]; then
    echo "no test was executed"
    failed=1
  fi
  echo "$passed passed, $failed failed"
  [ $failed = 0 ]
}

command=$1
shift
case $command in
  one) one "$1" ;;
  sum) sum "$@" ;;
  *) echo "usage: sh tests/run.sh one PROGRAM | sum NAME..." >&2; exit 2 ;;
esac
