#!/bin/sh
# Our steps and PyTorch's, process by process in turn (A B A B ...), each with its best
# number of threads out of 1 and 2. Medians, and the median ratio of the pairs.
#   sh tests/bench/compare.sh
# PYTHON  interpreters with PyTorch, one or several (python3)
# CASES   charlm charlm8192 gpt384 vit generate (all but charlm8192)
# MODES   eager compile (both; compile from PyTorch 2 on)
# PAIRS   pairs per comparison (3)
# CLOCK   wall, or cpu: one thread, processor time, for a machine that is busy otherwise
here=$(dirname "$0")
bench=build/bench
cases=${CASES:-charlm gpt384 vit generate}
pairs=${PAIRS:-3}
threads="1 2"
wall=--wall
cpu=
if [ "${CLOCK:-wall}" = cpu ]; then threads=1 wall='' cpu=--cpu; fi
# An OpenBLAS older than the processor would fall back to SSE in PyTorch 1.13.
if grep -q avx512f /proc/cpuinfo 2> /dev/null; then
  OPENBLAS_CORETYPE=${OPENBLAS_CORETYPE:-SkylakeX}
  export OPENBLAS_CORETYPE
fi
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM

# value KEY: of the last line "ms=1.23 peak_mb=4.5" of stdin; nothing when there is none
value() { sed -n "s/.*$1=\\([0-9.][0-9.]*\\).*/\\1/p" | tail -n 1; }
ours() { $bench $wall --threads "$2" run "$1"; }                       # CASE THREADS
theirs() { "$python" "$here/torch_step.py" "$1" --threads "$2" $cpu $flag 2> "$tmp/err"; }
median() { sort -n "$1" | awk '{ v[NR] = $1 }
  END { print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'; }
# best PROGRAM CASE: the number of threads with the least ms; nothing when none ran
best() {
  for t in $threads; do
    ms=$("$1" "$2" "$t" | value ms)
    [ -n "$ms" ] && echo "$ms $t"
  done | sort -n | awk 'NR == 1 { print $2 }'
}

compare() {   # compare CASE OUR_THREADS LABEL
  their=$(best theirs "$1")
  if [ -z "$their" ]; then
    echo "$1, $3: does not run here: $(tail -n 1 "$tmp/err")"
    return
  fi
  rm -f "$tmp"/[abr]
  i=0
  while [ $i -lt "$pairs" ]; do
    a=$(ours "$1" "$2") b=$(theirs "$1" "$their")
    x=$(echo "$a" | value ms) y=$(echo "$b" | value ms)
    echo "$x" >> "$tmp/a"
    echo "$y" >> "$tmp/b"
    echo "$x $y" | awk '{ print $2 / $1 }' >> "$tmp/r"
    i=$((i + 1))
  done
  printf '%-10s %-28s ours %9.3f ms (%s)  theirs %9.3f ms (%s)  %6.2f x   MB %s / %s\n' \
    "$1" "$3" "$(median "$tmp/a")" "$2" "$(median "$tmp/b")" "$their" \
    "$(median "$tmp/r")" "$(echo "$a" | value peak_mb)" "$(echo "$b" | value peak_mb)"
}

echo "ms of a step (generate: of a token), threads in parentheses, theirs / ours, peak" \
  "memory above idle ours / theirs; ${CLOCK:-wall} time, $pairs pairs"
for case in $cases; do
  mine=$(best ours "$case")
  for python in ${PYTHON:-python3}; do
    flag=
    version=$("$python" "$here/torch_step.py" version 2> "$tmp/err")
    if [ -z "$version" ]; then
      echo "$python: no PyTorch: $(tail -n 1 "$tmp/err")"
      continue
    fi
    for mode in ${MODES:-eager compile}; do
      [ "$mode" = compile ] && flag=--compile
      case $mode$version in compile1.*) continue ;; esac
      compare "$case" "$mine" "PyTorch $version $mode"
    done
  done
done
