#!/bin/sh
# The header compiles without a warning as C99, C11 and C++11, C++20, with gcc and clang,
# with and without OpenMP and each option, and works from two translation units. The
# programs of README.md compile and run.
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
  exf_ctx *ctx = exf_ctx_new(NULL);
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

for cc in gcc clang; do
  if ! have $cc; then skip "$cc: not installed"; continue; fi
  c="$cc -std=c99 $cwarn -c $dir/impl.c -o /dev/null"
  check "$cc c99 -O2" "$c -O2"
  check "$cc c99 -O0 EXF_DOUBLE" "$c -O0 -DEXF_DOUBLE"
  check "$cc c99 EXF_NO_SIMD" "$c -O1 -DEXF_NO_SIMD"
  check "$cc c99 EXF_NO_STDIO" "$c -O0 -DEXF_NO_STDIO"
  check "$cc c11" "$cc -std=c11 $cwarn -O0 -c $dir/impl.c -o /dev/null"
  check "$cc EXF_STATIC" "$cc -std=c99 $cwarn -O0 $dir/static.c -o $dir/static_$cc -lm && $dir/static_$cc"
  check "$cc two units" "$cc -std=c99 $cwarn -O0 $dir/impl.c $dir/user.c -o $dir/two_$cc -lm && $dir/two_$cc"
  if echo '#include <omp.h>' | $cc -fopenmp -x c -fsyntax-only - 2> /dev/null; then
    check "$cc OpenMP" "$c -O2 -fopenmp"
    check "$cc OpenMP EXF_NO_OPENMP" "$c -O0 -fopenmp -DEXF_NO_OPENMP"
  else
    skip "$cc -fopenmp: no omp.h"
  fi
done
for cxx in g++ clang++; do
  if ! have $cxx; then skip "$cxx: not installed"; continue; fi
  for std in c++11 c++20; do
    check "$cxx $std" "$cxx -std=$std $warn -O1 -c $dir/impl.cpp -o /dev/null"
  done
  check "$cxx EXF_STATIC" "$cxx -std=c++11 $warn -O0 $dir/static.cpp -o $dir/static_$cxx -lm && $dir/static_$cxx"
  check "$cxx EXF_DOUBLE" "$cxx -std=c++11 $warn -O0 -DEXF_DOUBLE -c $dir/impl.cpp -o /dev/null"
  check "$cxx two units" "$cxx -std=c++11 $warn -O0 $dir/impl.cpp $dir/user.cpp -o $dir/two_$cxx -lm && $dir/two_$cxx"
done
if have gcc; then
  # an implementation in C serves a program in C++
  if have g++; then
    check "C unit, C++ unit" "gcc -std=c99 -O0 -c $dir/impl.c -o $dir/mixed.o && g++ -std=c++11 $warn $dir/mixed.o $dir/user.cpp -o $dir/mixed -lm && $dir/mixed"
  fi
  check "fast-math is refused" "! gcc -ffast-math -fsyntax-only $dir/impl.c 2> $dir/fast.txt && grep -q EXF_ALLOW_FAST_MATH $dir/fast.txt"
  check "fast-math is allowed" "gcc -ffast-math -DEXF_ALLOW_FAST_MATH -fsyntax-only $dir/impl.c"
  # nothing of the library is visible under another prefix, and nothing is mutable
  check "symbols" "gcc -O1 -c $dir/impl.c -o $dir/symbols.o && nm $dir/symbols.o | awk '\$2 ~ /[BCDGSVW]/ || (\$2 == \"T\" && \$3 !~ /^exf_/) || (\$2 ~ /[bd]/ && \$3 ~ /exf/)'"
  # no call that prints, ends the process, or reads the environment
  check "imports" "nm -u $dir/symbols.o | awk '\$2 ~ /^(printf|puts|putchar|exit|abort|getenv|rand|srand|setlocale|system|__assert_fail)\$/'"
fi

# Programs in README.md: every C block with a main, compiled as a reader would.
if [ -f README.md ]; then
  awk -v dir=$dir '
    /^```c$/ { on = 1; text = ""; next }
    /^```/ && on { on = 0; if (text ~ /main\(/) printf "%s", text > (dir "/readme_" ++k ".c") }
    on { text = text $0 "\n" }' README.md
  for file in $dir/readme_*.c; do
    [ -f "$file" ] || continue
    base=$(basename "$file" .c)
    mkdir -p $dir/$base.run
    check "README program $base" "${CC:-cc} -O2 $cwarn -std=c99 -I. $file -o $dir/$base -lm && cd $dir/$base.run && timeout 60 ../$base > out.txt && test -s out.txt"
  done
fi
wait

passed=$(cat $dir/*.result | grep -c '^passed$')
failed=$((n - passed))
cat $dir/*.result | grep -v '^passed$'
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
