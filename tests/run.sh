#!/bin/sh
# Runs test programs and test scripts, each of which prints `N passed, N failed` as its
# last line, and prints the sum as its own. A program that crashes, or that ends without
# that line, counts as a failure; so does a run of no tests at all.
#   sh tests/run.sh PROGRAM...      from the top folder; logs go to build/tests
mkdir -p build/tests build/tmp
# Waiting threads sleep: tests share their processors with other work.
export OMP_WAIT_POLICY=passive
passed=0
failed=0
for program in "$@"; do
  name=$(basename "$program")
  log=build/tests/$name.log
  start=$(date +%s)
  case $program in
    *.sh) sh "$program" > "$log" 2>&1 ;;
    *) "$program" > "$log" 2>&1 ;;
  esac
  status=$?
  seconds=$(($(date +%s) - start))
  line=$(tail -n 1 "$log")
  p=$(printf '%s\n' "$line" | sed -n 's/^\([0-9][0-9]*\) passed, [0-9][0-9]* failed$/\1/p')
  f=$(printf '%s\n' "$line" | sed -n 's/^[0-9][0-9]* passed, \([0-9][0-9]*\) failed$/\1/p')
  skipped=$(grep -c '^skipped ' "$log")
  if [ -z "$p" ]; then
    echo "FAILED $name: it ended with status $status and without a count" >> "$log"
    p=0
    f=1
  elif [ "$f" = 0 ] && [ "$status" != 0 ]; then
    echo "FAILED $name: it ended with status $status" >> "$log"
    f=1
  fi
  note=""
  if [ "$skipped" != 0 ]; then note=", $skipped skipped"; fi
  printf '%-22s %4d passed, %d failed%s (%d s)\n' "$name" "$p" "$f" "$note" "$seconds"
  if [ "$f" != 0 ]; then sed 's/^/    /' "$log"; fi
  passed=$((passed + p))
  failed=$((failed + f))
done
if [ $((passed + failed)) = 0 ]; then
  echo "no test was executed"
  failed=1
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
