#!/bin/sh
# Static analysis of exfusion.h and the examples: gcc -fanalyzer, clang-tidy, cppcheck.
# Silence is a pass. Every check that is switched off stands here, with its reason.
#     sh tests/analyze.sh [gcc|clang-tidy|cppcheck]...
dir=build/analyze
mkdir -p $dir
passed=0 failed=0
printf '#define EXFUSION_IMPLEMENTATION\n#include "../../exfusion.h"\n' > $dir/impl.c

# gcc -fanalyzer: everything in the header; in the examples without
examples="-Wno-analyzer-malloc-leak"      # a flag's text is owned by the table of flags
examples="$examples -Wno-analyzer-use-of-uninitialized-value"  # row[0..n] is filled
# Examples are looked at without the implementation, which has its own turn.
examples="$examples -DEXF__IMPLEMENTED"

# clang-tidy: all of these families ...
tidy="clang-analyzer-*,bugprone-*,cert-*,misc-*,performance-*,portability-*,concurrency-*"
# ... but for
off() { tidy="$tidy,-$1"; }
off bugprone-easily-swappable-parameters  # sizes and pointers side by side: BLAS style
off bugprone-implicit-widening-of-multiplication-result  # small constants of the kernels
off bugprone-macro-parentheses            # vector types and literals are no expressions
off bugprone-narrowing-conversions        # bytes of UTF-8 and digits go into char
off bugprone-sizeof-expression            # arrays of pointers are meant
off bugprone-reserved-identifier          # _POSIX_C_SOURCE is to be defined by programs
off cert-dcl37-c                          # another name of the last one
off cert-dcl51-cpp                        # and another
off cert-err33-c                          # snprintf may shorten; output to a terminal
off cert-err34-c                          # sscanf of a list that is checked later
off cert-flp30-c                          # sees a float counter where the counter is an n
off clang-analyzer-deadcode.DeadStores    # values that only a build with OpenMP reads
off clang-analyzer-security.insecureAPI.strcpy  # into blocks made to measure just before
off concurrency-mt-unsafe                 # strerror: C99 has no other; exit in programs
off performance-no-int-to-ptr             # file descriptors travel as void *

# cppcheck: warnings, performance, portability; but for
quiet="--suppress=readdirCalled"                  # readdir_r is no better: deprecated
quiet="$quiet --suppress=zerodiv:examples/images.h"  # the weights of resize: at least one

# report NAME: what is left in the log are findings
report() {
  if [ -s $dir/log ]; then
    failed=$((failed + 1))
    echo "FAILED $1"
    head -n 60 $dir/log
  else
    passed=$((passed + 1))
    echo "$1: nothing found"
  fi
}

tool() {
  if command -v "$1" > /dev/null 2>&1; then return 0; fi
  echo "skipped $1: not installed"
  return 1
}

for what in ${*:-gcc clang-tidy cppcheck}; do
  tool "$what" || continue
  for source in $dir/impl.c $(ls examples/*.c); do
    case $what in
      gcc) case $source in examples/*) flags=$examples ;; *) flags=-DEXF_NO_SIMD ;; esac
        gcc -std=c99 -O1 $flags -fanalyzer -c "$source" -o /dev/null > $dir/log 2>&1 ;;
      clang-tidy) clang-tidy --quiet --header-filter='.*' "--checks=-*,$tidy" "$source" \
        -- -std=c99 > $dir/log 2> /dev/null ;;
      cppcheck) cppcheck -q --std=c99 --enable=warning,performance,portability \
        $quiet --library=posix -DEXF_NO_SIMD -D__unix__ -D__GNUC__=12 "$source" \
        > $dir/log 2>&1 ;;
    esac
    report "$what $(basename "$source")"
  done
done
echo "$passed passed, $failed failed"
[ $failed = 0 ] && [ $passed -gt 0 ]
