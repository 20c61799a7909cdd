#!/bin/sh
# All test programs, golden_hash and whole runs of the examples under the sanitizers of
# Clang, built without OpenMP, whose threads TSan does not know; the quick ones under
# valgrind. A finding ends a program. There are no suppressions.
#     sh tests/sanitize.sh [TOOL]... [PROGRAM]...
# TOOL: address (with leaks and undefined behaviour), memory, thread, valgrind.
dir=build/sanitize
mkdir -p $dir build/tmp build/tests
passed=0 failed=0
cc="${SANITIZE_CC:-clang} -std=c99 -O1 -g1 -fno-omit-frame-pointer"
stb=$(make -s print-stb)
tools= only=
for word in "$@"; do
  case $word in
    address | memory | thread | valgrind) tools="$tools $word" ;;
    *) only="$only $word" ;;
  esac
done

# The tests ask for impossible amounts of memory, which malloc is to refuse.
ASAN_OPTIONS=allocator_may_return_null=1:detect_stack_use_after_return=1
MSAN_OPTIONS=allocator_may_return_null=1
TSAN_OPTIONS=allocator_may_return_null=1:halt_on_error=1
UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export ASAN_OPTIONS MSAN_OPTIONS TSAN_OPTIONS UBSAN_OPTIONS

flags_of() {
  case $1 in
    address) echo "-fsanitize=address,undefined,float-cast-overflow" \
      "-fno-sanitize-recover=all" ;;
    memory) echo "-fsanitize=memory" ;;
    thread) echo "-fsanitize=thread" ;;
    valgrind) echo "-gdwarf-4" ;;  # the newest that it reads
  esac
}

# report NAME STATUS: counts a program, and shows the end of its output when it failed
report() {
  if [ "$2" = 0 ]; then
    passed=$((passed + 1))
    printf '%-10s %-24s %s\n' $tool "$1" "$(tail -n 1 $dir/log | cut -c1-40)"
  else
    failed=$((failed + 1))
    echo "FAILED $tool $1: status $2"
    grep -v '^skipped' $dir/log | head -n 40
  fi
}

run() {   # run TITLE COMMAND...
  title=$1
  shift
  "$@" > $dir/log 2>&1 < /dev/null
  report "$title" $?
}

# build NAME SOURCE FLAGS...: a program. What uses the public functions alone is linked to
# the implementation, or to that of doubles. Fails when the program is not asked for.
build() {
  name=$1 source=$2 object=$dir/impl.o
  shift 2
  case " ${only:-$name} " in *" $name "*) ;; *) return 1 ;; esac
  case $name in
    test_algebra | test_faults | test_kernels | test_ops | test_ops_double \
      | test_safetensors) object= ;;
    *_double) object=$dir/double.o; set -- "$@" -DEXF_DOUBLE ;;
    test_fuzz | test_images | test_vit_golden) set -- "$@" $stb ;;
  esac
  if [ $object ]; then
    if [ ! -f $object ]; then $cc $flags "$@" -c $dir/impl.c -o $object || exit 1; fi
    set -- "$@" -DEXF__IMPLEMENTED
  fi
  $cc $flags -pthread "$@" "$source" $object -o $dir/$name -lm > $dir/log 2>&1 && return
  report "$name" "it does not compile"
  return 1
}

test_program() {   # test_program NAME SOURCE FLAGS...
  if build "$@" '-DTEST_TMP="build/tmp"'; then run "$name" $runner $dir/$name; fi
}

# example NAME FLAGS...: trains, and does what can be done with the model
example() {
  build "$1" examples/$1.c || return
  shift
  rm -rf $dir/run
  run "$name train" $runner $dir/$name train --quick --steps 20 --out $dir/run "$@"
  run "$name eval" $runner $dir/$name eval $dir/run
  run "$name info" $runner $dir/$name info $dir/run/model.safetensors
  if [ $name != charlm ]; then return; fi
  run "charlm sample" $runner $dir/charlm sample $dir/run -n 60
}

# Addresses must not be random for TSan and MSan of some versions.
still=
if setarch -R true 2> /dev/null; then still="setarch -R"; fi
printf '#define EXFUSION_IMPLEMENTATION\n#include "../../exfusion.h"\n' > $dir/impl.c
echo 'int main(void) { return 0; }' > $dir/probe.c
for tool in ${tools:-address memory thread valgrind}; do
  flags=$(flags_of $tool)
  if ! $cc $flags $dir/probe.c -o $dir/probe > /dev/null 2>&1 || ! $still $dir/probe; then
    echo "skipped $tool: $cc $flags does not work here"
    continue
  fi
  if [ $tool = valgrind ] && ! command -v valgrind > /dev/null; then
    echo "skipped valgrind: not installed"
    continue
  fi
  rm -f $dir/impl.o $dir/double.o
  runner=$still
  if [ $tool = valgrind ]; then
    runner="valgrind -q --error-exitcode=9 --leak-check=full"
    for name in test_golden test_malicious test_numbers test_optim golden_hash; do
      test_program $name tests/$name.c
    done
    test_program hello examples/hello.c
    continue
  fi
  for source in tests/test_*.c tests/golden_hash.c; do
    test_program "$(basename "$source" .c)" "$source"
  done
  for name in $(make -s print-doubles); do
    test_program "$name" "tests/${name%_double}.c" -DEXF_DOUBLE
  done
  example charlm
  example vit --ema 0.9
done
echo "$passed passed, $failed failed"
[ $failed = 0 ] && [ $passed -gt 0 ]
