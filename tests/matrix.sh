#!/bin/sh
# The compile-and-run matrix: every row compiles tests/golden_hash.c in one configuration,
# runs it, and prints pass, FAIL, or the reason why it was skipped. A pass means: no
# warning, every check of the program held, and the hash of all weights equals that of the
# first row with the same kind of bits:
#   fma     fused multiply-adds: one value on every platform
#   nofma   SSE2 kernels, which have none: another value
#   files   the models that 50 steps of each example write: one value on every platform
#   double  EXF_DOUBLE, which uses libm: the checks alone
#   own     arithmetic that the manual excludes (x87, fast-math, Clang contracting): the
#           checks alone
#     sh tests/matrix.sh [PATTERN]     from the top folder; only rows that match (grep -E)
# One process at a time. It may be stopped and called again: programs and passes are kept
# until a source changes.
dir=build/matrix
sources=$(cat exfusion.h tests/*.h tests/golden_hash.c examples/*.[ch] | cksum)
if [ "$(cat $dir/sources 2> /dev/null)" != "$sources" ]; then rm -rf $dir; fi
mkdir -p $dir/passed
echo "$sources" > $dir/sources
rm -f $dir/fma $dir/nofma $dir/files
only=${1:-.}
here=$(pwd)
src=tests/golden_hash.c
warn="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wundef -Werror"
tmp="-DTEST_TMP='\"$dir\"'"
n=0 pass=0 fail=0 skipped=0 suffix=

have() { command -v "$1" > /dev/null 2>&1; }
wanted() { printf '%s\n' "$1" | grep -q -E -e "$only"; }
say() { printf '%-50s %-6s %s\n' "$name" "$bits" "$*"; }
skip() { skipped=$((skipped + 1)); say "skipped ($*)"; }
wrong() { fail=$((fail + 1)); say "FAIL: $*"; head -n 8 $dir/out; }

# row NAME BITS TOOLS COMPILE RUN: two shell commands, which know the program as $exe, and
# the tools they need. Equal programs are compiled once.
row() {
  name=$1 bits=$2 tools=$3 compile=$4 run=$5
  wanted "$name" || return
  n=$((n + 1))
  for tool in $tools; do
    if ! have "$tool"; then skip "$tool is not installed"; return; fi
  done
  exe=$here/$dir/$(printf '%s' "$compile" | cksum | cut -d' ' -f1)$suffix
  result=$dir/passed/$(printf '%s' "$name $bits $compile $run" | cksum | cut -d' ' -f1)
  export exe
  if [ -s $result ]; then
    cp $result $dir/out
    status=0
  else
    if [ ! -e "$exe.done" ]; then
      sh -c "$compile" > $dir/out 2>&1 || { wrong "does not compile"; return; }
      if [ -s $dir/out ]; then wrong "does not compile in silence"; return; fi
      : > "$exe.done"
    fi
    sh -c "$run" > $dir/out 2>&1
    status=$?
  fi
  hash=$(tr -d '\r' < $dir/out | tail -n 1)
  isa=${hash#* }
  hash=${hash%% *}
  if [ $status = 2 ]; then skip "$isa"; return; fi
  if [ $status != 0 ] || [ ${#hash} != 64 ]; then wrong "status $status"; return; fi
  case $bits in
    fma | nofma | files)
      if [ ! -s $dir/$bits ]; then echo "$hash" > $dir/$bits; fi
      if [ "$hash" != "$(head -n 1 $dir/$bits)" ]; then wrong "other bits"; return; fi
      echo "$hash" >> $dir/$bits ;;
  esac
  pass=$((pass + 1))
  cp $dir/out $result
  say "pass    $isa"
}

# able NAME "COMPILER FLAGS": whether it can link a program at all; else the row is skipped
able() {
  wanted "$1" && have "${2%% *}" || return 0
  sh -c "$2 $dir/probe.c -o $dir/probe$suffix -lm" > $dir/out 2>&1 && return
  n=$((n + 1))
  skip "this compiler lacks headers or libraries for it"
  return 1
}

# one NAME BITS "COMPILER FLAGS" [ARGUMENTS [RUNNER]]: the program as one unit
one() {
  name=$1 bits=$2 runner=${5:-}
  flags="$warn -Wvla -Wstrict-prototypes -Wmissing-prototypes"
  case $3 in
    *++*) flags=$warn ;;
    x86_64-w64-mingw32*) suffix=.exe ;;
    emcc*) suffix=.js ;;
    *) suffix= ;;
  esac
  if able "$1" "$3"; then
    row "$1" "$2" "${3%% *} ${runner%% *}" "$3 $flags $tmp $src -o \$exe -lm" \
      "$runner \$exe ${4:-}"
  fi
  suffix=
}

# link NAME COMPILER COMPILER: the implementation by the first, its user by the second
link() {
  impl="-std=c99 $dir/impl.c" user="-std=c99 $src"
  case $2 in *++) impl="-std=c++11 $dir/impl.cpp" ;; esac
  case $3 in *++) user="-std=c++11 -Itests $dir/user.cpp" ;; esac
  object=$dir/impl-$2.o
  row "$1" fma "$2 $3" "{ [ -f $object ] || $2 -O0 $warn -c $impl -o $object; } \
    && $3 -O0 $warn $tmp -DTEST_LINKED $user $object -o \$exe -lm" "\$exe"
}

# examples NAME "COMPILER FLAGS" [FLAGS OF THE EXAMPLES [RUNNER [SUFFIX]]]
examples() {
  name="examples, $1" bits=files
  able "$name" "$2" || return
  row "examples, $1" files "${2%% *} ${4%% *} sha256sum" \
    "$2 $warn -c $dir/impl.c -o \$exe.o || exit; for e in charlm vit; do \
    $2 $warn -DEXF__IMPLEMENTED examples/\$e.c \$exe.o -o \$exe-\$e${5:-} -lm \
    || exit; done" \
    "sh $dir/examples.sh '${4:-}' '${5:-}' ${3:-}"
}

head -c 4000 exfusion.h > $dir/text
cat > $dir/examples.sh <<'END'
runner=$1 suffix=$2
shift 2
for run in charlm:text:dense charlm:text:mb vit:generated:dense vit:generated:mb; do
  e=${run%%:*} ffn=${run##*:} data=${run#*:}
  data=${data%:*}
  if [ $data = text ]; then data=build/matrix/text; fi
  case $e in charlm) size="--block 16" ;; vit) size="--patch 7" ;; esac
  rm -rf build/matrix/$e-$ffn
  $runner $exe-$e$suffix train --quiet --quick --data $data --ffn $ffn --layers 2 \
    --width 24 --heads 2 --batch 3 $size --steps 50 --eval-every 0 --save-every 0 \
    --out build/matrix/$e-$ffn "$@" 2>&1 || exit
  files="$files build/matrix/$e-$ffn/model.safetensors"
done
echo "$(cat $files | sha256sum | cut -d' ' -f1) 4 models"
END
cat > $dir/probe.c <<'END'
#include <math.h>
#include <stdio.h>
int main(void) { return printf("%g", sqrt(2)) < 1; }
END
cat > $dir/impl.c <<'END'
#define EXFUSION_IMPLEMENTATION
#include "../../exfusion.h"
END
cat > $dir/static.c <<'END'
#define EXFUSION_IMPLEMENTATION
#include "../../exfusion.h"
exf_ctx *other_context(void);
exf_ctx *other_context(void) { return exf_ctx_new(NULL); }
END
cp $dir/impl.c $dir/impl.cpp
sed 's|"\.\./exfusion|"../../exfusion|' $src > $dir/user.cpp
sed 's|"\.\./exfusion|"other_name|' $src > $dir/renamed.c
cp exfusion.h $dir/other_name.h

# ---- compilers and optimisation; the first row sets the hash
for cc in gcc clang; do
  for o in -O1 -O0 -O2 -O3 -Os "-O2 -flto" "-O3 -march=native" \
    "-O2 -funsigned-char"
  do
    case $o in *flto) if [ $cc = gcc ]; then o="$o=auto"; fi ;; esac
    one "$cc $o" fma "$cc -std=c99 $o"
  done
done
fused="-std=gnu17 -O2 -march=haswell -ffp-contract"
one "gcc -ffp-contract=fast" fma "gcc $fused=fast"
one "clang -ffp-contract=on" fma "clang $fused=on"
one "clang -ffp-contract=fast" own "clang $fused=fast"

# ---- C and C++ standards
for std in c99 c11 c17 gnu17; do
  for cc in gcc clang; do one "$cc -std=$std" fma "$cc -std=$std -O0"; done
done
for std in c++11 c++17 c++20; do
  for cxx in g++ clang++; do
    one "$cxx -std=$std" fma "$cxx -std=$std -O0 -x c++"
  done
done

# ---- the header alone in one unit, the implementation in another
for cc in gcc clang; do
  case $cc in gcc) cxx=g++ other=clang ;; *) cxx=clang++ other=gcc ;; esac
  link "two units, $cc" $cc $cc
  link "two units, $cc and $other" $cc $other
  link "two units, $cc and $cxx" $cc $cxx
  link "two units, $cxx" $cxx $cxx
  row "EXF_STATIC in two files, $cc" fma $cc "$cc -std=c99 -O0 $warn $tmp -DEXF_STATIC \
    $src $dir/static.c -o \$exe -lm" "\$exe"
done
api="-fvisibility=hidden '-DEXF_API=__attribute__((visibility(\"default\")))'"
row "shared library" fma gcc "gcc -std=c99 -O0 $warn -fPIC $api -shared $dir/impl.c \
  -o \$exe.so -lm \
  && gcc -std=c99 -O0 $warn $tmp -DTEST_LINKED $src \$exe.so -o \$exe -lm" "\$exe"

# ---- instruction sets and threads
for cc in gcc clang; do
  for isa in ref avx2 avx512; do one "$cc, $isa" fma "$cc -std=c99 -O1" $isa; done
  one "$cc, sse2" nofma "$cc -std=c99 -O1" sse2
  one "$cc -O0, sse2" nofma "$cc -std=c99 -O0" sse2
  for t in 1 2 3 8; do
    one "$cc -fopenmp, $t threads" fma "$cc -std=c99 -O1 -fopenmp" threads=$t
  done
done
for cc in gcc clang; do
  row "$cc, avx512 emulated" fma $cc "$cc -O1 -w -Wno-psabi \
    -include tests/avx512_emulated.h $tmp $src -o \$exe -lm" "\$exe avx512"
done
one "a processor without AVX2" nofma "gcc -std=c99 -O1 -static" "" \
  "qemu-x86_64 -cpu qemu64"

# ---- options
o="gcc -std=c99 -O0"
one "EXF_NO_SIMD, gcc" fma "gcc -std=c99 -O1 -DEXF_NO_SIMD"
one "EXF_NO_SIMD, clang" fma "clang -std=c99 -O2 -DEXF_NO_SIMD"
one "EXF_NO_OPENMP" fma "$o -fopenmp -DEXF_NO_OPENMP" threads=4
one "EXF_NO_STDIO" fma "$o -DEXF_NO_STDIO"
one "EXF_ALLOW_FAST_MATH, no -ffast-math" fma "$o -DEXF_ALLOW_FAST_MATH"
one "EXF_ALLOW_FAST_MATH, -ffast-math" own \
  "gcc -std=c99 -O2 -DEXF_ALLOW_FAST_MATH -ffast-math"
one "EXF_DOUBLE, gcc" double "gcc -std=c99 -O1 -DEXF_DOUBLE"
one "EXF_DOUBLE, clang" double "clang -std=c99 -O1 -DEXF_DOUBLE"
row "EXF_HEADER_NAME" fma gcc "$o $warn $tmp '-DEXF_HEADER_NAME=\"other_name.h\"' \
  -Itests $dir/renamed.c -o \$exe -lm" "\$exe"
all="-O1 -fopenmp -DEXF_NO_SIMD -DEXF_NO_OPENMP -DEXF_NO_STDIO -DEXF_ALLOW_FAST_MATH \
-DEXF_STATIC"
one "all options but EXF_DOUBLE" fma "$o $all"
one "all options" double "$o $all -DEXF_DOUBLE"

# ---- what a host program may have set
if have localedef && localedef -f UTF-8 -i de_DE $dir/de_DE.UTF-8 > /dev/null 2>&1; then
  LOCPATH=$here/$dir
  export LOCPATH
fi
for cc in gcc clang; do
  one "decimal comma, $cc" fma "$cc -std=c99 -O1" locale=de_DE.UTF-8
  one "subnormals flushed (FTZ, DAZ), $cc" fma "$cc -std=c99 -O1" ftz
done

# ---- 32-bit x86
headers=/usr/include/x86_64-linux-gnu   # where those of the 64-bit system serve both
for cc in gcc clang; do
  m32="$cc -isystem $headers -m32 -msse2 -mfpmath=sse"
  one "$cc -m32" fma "$m32 -std=c99 -O1"
  one "$cc -m32, ref" fma "$m32 -std=c99 -O1" ref
  one "$cc -m32, sse2" nofma "$m32 -std=c99 -O1" sse2
  one "$cc -m32 -O2 -std=gnu17" fma "$m32 -std=gnu17 -O2"
done
one "gcc -m32, x87" own "gcc -isystem $headers -m32 -mno-sse -std=c99 -O1"

# ---- other processors, emulated
arm64="aarch64-linux-gnu-gcc -static -std=c99"
for o in -O0 -O1 -O2 -O3 "-O2 -ffp-contract=fast"; do
  one "aarch64 $o" fma "$arm64 $o" "" qemu-aarch64
done
one "aarch64, ref" fma "$arm64 -O1" ref qemu-aarch64
one "aarch64 -fopenmp, 3 threads" fma "aarch64-linux-gnu-gcc -std=c99 -O1 -fopenmp" \
  threads=3 "qemu-aarch64 -L /usr/aarch64-linux-gnu"
one "aarch64, clang" fma "clang --target=aarch64-linux-gnu -static -std=c99 -O2" "" \
  qemu-aarch64
arm="arm-linux-gnueabihf-gcc -static -std=c99"
one "armv7 with vfpv4" fma "$arm -O1 -mfpu=neon-vfpv4" "" qemu-arm
one "armv7 -ffp-contract=fast" fma "$arm -O2 -mfpu=neon-vfpv4 -ffp-contract=fast" "" \
  qemu-arm
one "armv7 without fused multiply-add" fma "$arm -O2" "" qemu-arm
for o in "-std=c99 -O1" "-std=gnu17 -O2"; do
  one "s390x (big-endian) $o" fma "s390x-linux-gnu-gcc -static $o" "" qemu-s390x
done

# ---- other systems and libraries
wine=wine
for w in wine64 /usr/lib/wine/wine64; do
  if ! have $wine && have $w; then wine=$w; fi
done
WINEPREFIX=$here/$dir/wine WINEDEBUG=-all
export WINEPREFIX WINEDEBUG
for o in "-std=c99 -O0" "-std=c99 -O2" "-std=gnu17 -O2"; do
  one "mingw-w64 $o" fma "x86_64-w64-mingw32-gcc $o" "" $wine
done
one "mingw-w64, ref" fma "x86_64-w64-mingw32-gcc -std=c99 -O2" ref $wine
one "mingw-w64, sse2" nofma "x86_64-w64-mingw32-gcc -std=c99 -O2" sse2 $wine
wasm="emcc -std=c99 -s WASM_ASYNC_COMPILATION=0 -s ALLOW_MEMORY_GROWTH=1 -s NODERAWFS=1"
NODE_PATH=${NODE_PATH:-/usr/share/nodejs}   # modules of emcc, for a node from elsewhere
export NODE_PATH
for o in -O1 -O2; do one "emscripten $o" fma "$wasm $o" "" node; done
one "musl" fma "musl-gcc -std=c99 -O1"
one "musl, static, ref" fma "musl-gcc -static -std=c99 -O2" ref
one "tcc" fma tcc

# ---- the examples
for cc in gcc clang; do
  for o in -O0 -O2 -O3; do examples "$cc $o" "$cc -std=c99 $o"; done
done
for isa in ref avx2 avx512; do
  examples "gcc -O2, $isa" "gcc -std=c99 -O2" "--isa $isa"
done
for t in 1 2 3 8; do
  examples "gcc -O2 -fopenmp, $t threads" "gcc -std=c99 -O2 -fopenmp" "--threads $t"
done
examples "clang -m32" "clang -isystem $headers -m32 -msse2 -mfpmath=sse -std=c99 -O1"
examples "aarch64 -O2" "$arm64 -O2" "" qemu-aarch64
examples "aarch64, ref" "$arm64 -O2" "--isa ref" qemu-aarch64
examples "aarch64, clang" "clang --target=aarch64-linux-gnu -static -std=c99 -O2" "" \
  qemu-aarch64
examples "armv7 with vfpv4" "$arm -O1 -mfpu=neon-vfpv4" "" qemu-arm
examples "s390x (big-endian)" "s390x-linux-gnu-gcc -static -std=c99 -O1" "" qemu-s390x
examples "mingw-w64" "x86_64-w64-mingw32-gcc -std=c99 -O2" "" $wine .exe
examples "musl" "musl-gcc -std=c99 -O2"

echo
for bits in fma nofma files; do
  if [ -s $dir/$bits ]; then
    echo "$bits: $(head -n 1 $dir/$bits) in $(($(wc -l < $dir/$bits) - 1)) rows"
  fi
done
echo "$n rows: $pass pass, $fail FAIL, $skipped skipped"
[ $fail = 0 ] && [ $pass -gt 0 ]
