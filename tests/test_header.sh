#!/bin/sh
# The header compiles without a warning as C99, C11 and C++11, C++20, with gcc and clang,
# with and without OpenMP and each option, and works from two translation units.
# Compilers that are not installed are reported as skipped.
dir=build/header
rm -rf $dir
mkdir -p $dir
jobs_max=${JOBS:-2}
warn="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wvla -Wundef -Werror"
cwarn="$warn -Wstrict-prototypes -Wmissing-prototypes"
n=0

cat > $dir/impl.c <<'END'
#define EXFUSION_IMPLEMENTATION
#include "../../exfusion.h"
END
cat > $dir/static.c <<'END'
#define EXF_STATIC
#define EXFUSION_IMPLEMENTATION
#include "../../exfusion.h"
int main(void) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_ctx_free(ctx);
  return ctx == NULL;
}
END
cat > $dir/user.c <<'END'
#include "../../exfusion.h"
#include "../../exfusion.h"
int main(void) {
#ifdef __cplusplus
  exf_desc desc = {};
  desc.n_threads = 1;
  exf_ctx *ctx = exf_ctx_new(&desc);
#else
  exf_ctx *ctx = exf_ctx_new(&(exf_desc){.n_threads = 1});
#endif
  exf_real v[2] = {1, 2};
  exf_tensor *x = exf_tensor_new(ctx, exf_shape1(2), v);
  double sum = exf_item(exf_sum(ctx, exf_square(ctx, x), EXF_ALL_AXES, 0));
  exf_ctx_free(ctx);
  return sum != 5;
}
END
cp $dir/impl.c $dir/impl.cpp
cp $dir/user.c $dir/user.cpp
cp $dir/static.c $dir/static.cpp

# check NAME COMMAND: runs the command in the background; silent success is a pass.
check() {
  n=$((n + 1))
  name=$1
  shift
  (
    if sh -c "$*" > "$dir/$n.out" 2>&1 && [ ! -s "$dir/$n.out" ]; then
      echo passed > "$dir/$n.result"
    else
      { echo "FAILED $name: $*"; head -n 12 "$dir/$n.out"; } > "$dir/$n.result"
    fi
  ) &
  if [ $((n % jobs_max)) = 0 ]; then wait; fi
}
skip() { echo "skipped $1"; }
have() { command -v "$1" > /dev/null 2>&1; }
small="-O0 -DEXF_NO_SIMD"

# the tests' own copy, with optimization, whose analysis warns of more
check "no warning with CFLAGS" "test -f build/tests/exfusion.warnings && cat build/tests/exfusion.warnings"

for cc in gcc clang; do
  if ! have $cc; then skip "$cc: not installed"; continue; fi
  c="$cc -std=c99 $cwarn"
  check "$cc c99" "$c -O0 -c $dir/impl.c -o /dev/null"
  check "$cc c99 EXF_DOUBLE" "$c -O1 -DEXF_DOUBLE -c $dir/impl.c -o /dev/null"
  check "$cc c99 EXF_NO_SIMD" "$c -O1 -DEXF_NO_SIMD -c $dir/impl.c -o /dev/null"
  check "$cc c99 EXF_NO_STDIO" "$c -fsyntax-only -DEXF_NO_STDIO $dir/impl.c"
  check "$cc c11" "$cc -std=c11 $cwarn -fsyntax-only $dir/impl.c"
  check "$cc EXF_STATIC" "$c $small $dir/static.c -o $dir/static_$cc -lm && $dir/static_$cc"
  check "$cc EXF_STATIC alone" "$c -fsyntax-only $dir/static.c"
  check "$cc two units" "$c $small $dir/impl.c $dir/user.c -o $dir/two_$cc -lm && $dir/two_$cc"
  if echo '#include <omp.h>' | $cc -fopenmp -x c -fsyntax-only - 2> /dev/null; then
    check "$cc OpenMP" "$c -fopenmp -fsyntax-only $dir/impl.c"
    check "$cc OpenMP, EXF_NO_OPENMP" "$c -fopenmp -DEXF_NO_OPENMP -fsyntax-only $dir/impl.c"
  else
    skip "$cc -fopenmp: no omp.h"
  fi
done
for cxx in g++ clang++; do
  if ! have $cxx; then skip "$cxx: not installed"; continue; fi
  for std in c++11 c++20; do
    c="$cxx -std=$std $warn"
    check "$cxx $std" "$c -fsyntax-only $dir/impl.cpp"
    check "$cxx $std EXF_DOUBLE" "$c -fsyntax-only -DEXF_DOUBLE $dir/impl.cpp"
  done
  c="$cxx -std=c++11 $warn"
  check "$cxx compiles" "$c -O0 -c $dir/impl.cpp -o /dev/null"
  check "$cxx EXF_STATIC" "$c $small $dir/static.cpp -o $dir/static_$cxx -lm && $dir/static_$cxx"
  check "$cxx two units" "$c $small $dir/impl.cpp $dir/user.cpp -o $dir/two_$cxx -lm && $dir/two_$cxx"
done
if have gcc; then
  # an implementation in C serves a program in C++
  if have g++; then
    check "C unit, C++ unit" "gcc -std=c99 $small -c $dir/impl.c -o $dir/mixed.o && g++ -std=c++11 $warn $dir/mixed.o $dir/user.cpp -o $dir/mixed -lm && $dir/mixed"
  fi
  check "fast-math is refused" "! gcc -ffast-math -fsyntax-only $dir/impl.c 2> $dir/fast.txt && grep -q EXF_ALLOW_FAST_MATH $dir/fast.txt"
  check "fast-math is allowed" "gcc -ffast-math -DEXF_ALLOW_FAST_MATH -fsyntax-only $dir/impl.c"
  # nothing of the library is visible under another prefix, and nothing is mutable;
  # no call that prints, ends the process, or reads the environment
  wait
  gcc -O0 -fno-pic -fno-pie -c $dir/impl.c -o $dir/symbols.o
  check "symbols" "nm $dir/symbols.o | awk '\$2 ~ /[BCDGSVW]/ || (\$2 == \"T\" && \$3 !~ /^exf_/) || (\$2 ~ /[bd]/ && \$3 ~ /exf/)'"
  taboo="printf|vprintf|puts|putchar|perror|stdin|stdout|stderr|_?exit|abort|atexit|getenv|setenv|s?rand|random|time|setlocale|signal|sigaction|raise|system|__assert_fail"
  check "imports" "nm -u $dir/symbols.o | awk '\$2 ~ /^($taboo)\$/'"
  gcc $small -c $dir/static.c -o $dir/static.o
  check "EXF_STATIC exports nothing" "nm -g --defined-only $dir/static.o | grep -v ' main\$'; true"
  gcc -O0 -DEXF_NO_STDIO -DEXF_NO_SIMD -c $dir/impl.c -o $dir/nostdio.o
  check "EXF_NO_STDIO opens nothing" "nm -u $dir/nostdio.o | awk '\$2 ~ /^(fopen|open|fread|fwrite|read|write|fsync|rename|remove|unlink)\$/'"
fi
wait

passed=$(cat $dir/*.result | grep -c '^passed$')
failed=$((n - passed))
cat $dir/*.result | grep -v '^passed$'
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
