#!/bin/sh
# All test programs, golden_hash and a whole run of charlm under the sanitizers of Clang,
# built without OpenMP, whose threads TSan does not know; the quick ones under valgrind.
# A finding ends a program. There are no suppressions.
#     sh tests/sanitize.sh [address|undefined|memory|thread|valgrind]...
dir=build/sanitize
mkdir -p $dir build/tmp build/tests
passed=0 failed=0
cc="${SANITIZE_CC:-clang} -std=c99 -O1 -g -fno-omit-frame-pointer"

# The tests ask for impossible amounts of memory, which malloc is to refuse.
ASAN_OPTIONS=allocator_may_return_null=1:detect_stack_use_after_return=1
MSAN_OPTIONS=allocator_may_return_null=1
TSAN_OPTIONS=allocator_may_return_null=1:halt_on_error=1
UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export ASAN_OPTIONS MSAN_OPTIONS TSAN_OPTIONS UBSAN_OPTIONS

flags_of() {
  case $1 in
    address) echo "-fsanitize=address" ;;
    undefined) echo "-fsanitize=undefined,float-cast-overflow" \
      "-fno-sanitize-recover=all" ;;
    memory) echo "-fsanitize=memory -fsanitize-memory-track-origins" ;;
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

run() {   # run NAME COMMAND...
  name=$1
  shift
  "$@" > $dir/log 2>&1 < /dev/null
  report "$name" $?
}

build() {   # build SOURCE FLAGS...
  source=$1
  exe=$dir/$(basename "$source" .c)
  shift
  if ! $cc -pthread "$@" "$source" $objects -o "$exe" -lm > $dir/log 2>&1; then
    report "$source" "it does not compile"
    return 1
  fi
}

# Addresses must not be random for TSan and MSan of some versions.
still=
if setarch -R true 2> /dev/null; then still="setarch -R"; fi
printf '#define EXFUSION_IMPLEMENTATION\n#include "../../exfusion.h"\n' > $dir/impl.c
echo 'int main(void) { return 0; }' > $dir/probe.c
# Tests of the public functions share one compiled implementation, as in the Makefile.
linked="$(make -s print-linked) golden_hash"
for tool in ${*:-address undefined memory thread valgrind}; do
  flags=$(flags_of $tool)
  objects=
  if ! build $dir/probe.c $flags > /dev/null 2>&1 || ! $still $dir/probe; then
    echo "skipped $tool: $cc $flags does not work here"
    failed=0
    continue
  fi
  if [ $tool = valgrind ] && ! command -v valgrind > /dev/null; then
    echo "skipped valgrind: not installed"
    continue
  fi
  $cc $flags -c $dir/impl.c -o $dir/impl.o || exit 1
  runner=$still programs="$(ls tests/test_*.c) tests/golden_hash.c"
  if [ $tool = valgrind ]; then
    runner="valgrind -q --error-exitcode=9 --leak-check=full"
    programs="tests/test_core.c tests/golden_hash.c examples/hello.c"
  fi
  for source in $programs; do
    objects= define=-DTEST_SANITIZE
    case " $linked " in
      *" $(basename "$source" .c) "*) objects=$dir/impl.o define=-DTEST_LINKED ;;
    esac
    build "$source" $flags $define '-DTEST_TMP="build/tmp"' || continue
    run "$(basename "$source" .c)" $runner "$exe"
  done
  objects=
  if [ $tool != valgrind ] && build examples/charlm.c $flags; then
    run "charlm train" $runner "$exe" train --quick --steps 40 --out $dir/run
    run "charlm sample" $runner "$exe" sample $dir/run -n 60
    run "charlm eval" $runner "$exe" eval $dir/run
    run "charlm info" $runner "$exe" info $dir/run/model.safetensors
  fi
done
echo "$passed passed, $failed failed"
[ $failed = 0 ] && [ $passed -gt 0 ]
