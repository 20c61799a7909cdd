#!/bin/sh
# What the manual (head comment of exfusion.h) and README.md say is so: their C programs
# compile without a warning, run, and print what the text says; the op that the manual
# adds works; functions, macros, tags, files, commands and flags that they name exist.
#   sh tests/test_docs.sh      from the top folder, after `make`
# A program in the manual is a run of lines indented by four, in README.md a ```c block,
# that has the include; `// -> text` in it is the next line it must print. Programs that
# fill descriptors where they are used are C alone, the others C++11 as well.
dir=build/docs
rm -rf $dir
mkdir -p $dir
: > $dir/cxx
passed=0
failed=0
ok() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "FAILED $*"; }
expect() {   # expect NAME COMMAND...: the command succeeds
  name=$1
  shift
  if "$@" > $dir/out 2>&1; then ok; else bad "$name"; head -n 5 $dir/out; fi
}

# ---- the manual is the first comment of the header
awk '{ print } /\*\// { exit }' exfusion.h > $dir/manual.txt
awk 'on; /\*\// { on = 1 }' exfusion.h > $dir/code.h
expect "the manual is there" test "$(grep -c '' $dir/manual.txt)" -gt 200
expect "the README is there" test -s README.md

# ---- programs
awk -v dir=$dir '
  function flush() {
    if (text ~ /#include "exfusion.h"/) printf "%s", text > (dir "/manual_" ++k ".c")
    text = blank = ""
  }
  /^    [^ ]/ || (text != "" && /^     /) { text = text blank substr($0, 5) "\n"; blank = ""; next }
  /^ *$/ && text != "" { blank = blank "\n"; next }
  { flush() }
  END { flush() }' $dir/manual.txt
awk -v dir=$dir '
  /^```c$/ { on = 1; text = ""; next }
  /^```/ && on { on = 0; if (text ~ /#include/) printf "%s", text > (dir "/readme_" ++k ".c") }
  on { text = text $0 "\n" }' README.md

# Runs a program in a folder of its own; what it prints must be its `// -> ` lines.
run_program() {
  base=$1
  mkdir -p $dir/$base.run
  if ! (cd $dir/$base.run && timeout 120 ../$base > ../$base.txt 2> ../$base.err); then
    bad "$base: it ends with an error"
    head -n 3 $dir/$base.err
    return
  fi
  ok
  if [ -s $dir/$base.err ]; then bad "$base: stderr: $(head -n 1 $dir/$base.err)"; else ok; fi
  sed -n 's/.*\/\/ -> \(.*\)$/\1/p' $dir/$base.c > $dir/$base.want
  if ! grep -q 'main(' $dir/$base.c; then return; fi
  if [ ! -s $dir/$base.want ]; then bad "$base: no line says what it prints"; return; fi
  if cmp -s $dir/$base.want $dir/$base.txt; then ok; else
    bad "$base: it prints something else"
    diff $dir/$base.want $dir/$base.txt | head -n 6
  fi
}

# All are compiled at once, JOBS at a time; without optimization, as it is the warnings
# that count. A program without main is given an empty one.
n=0
for file in $dir/manual_*.c $dir/readme_*.c; do
  [ -f "$file" ] || continue
  n=$((n + 1))
  base=$(basename "$file" .c)
  main=""
  if ! grep -q 'main(' "$file"; then
    mkdir -p $dir/$base.run
    echo 'int main(void) { return 0; }' > "$dir/$base.run/main.c"
    main=$dir/$base.run/main.c
  fi
  # shellcheck disable=SC2086
  "${CC:-cc}" -O0 -std=c99 -Wall -Wextra -Wpedantic -I. "$file" $main -o $dir/$base -lm \
    > $dir/$base.log 2>&1 &
  if [ $((n % ${JOBS:-2})) = 0 ]; then wait; fi
done
wait
for from in manual readme; do
  n=0
  for file in $dir/${from}_*.c; do
    [ -f "$file" ] || continue
    n=$((n + 1))
    base=$(basename "$file" .c)
    if [ -x $dir/$base ] && [ ! -s $dir/$base.log ]; then
      ok
      run_program "$base"
      if grep -q -E "\\)\\{|\\{\\." "$file"; then continue; fi
      echo "$base" >> $dir/cxx
      if command -v "${CXX:-c++}" > /dev/null; then
        expect "$base is C++, too" "${CXX:-c++}" -std=c++11 -Wall -Wextra -I. -x c++ \
          -DEXF__IMPLEMENTED -fsyntax-only "$file"
      fi
    else
      bad "$base: it does not compile without a word"
      head -n 6 $dir/$base.log
    fi
  done
  if [ $n = 0 ]; then bad "$from: no program found"; else ok; fi
done
expect "the manual has at least five programs" test -f $dir/manual_5.c
expect "some of them are C++11 as well" test "$(grep -c manual $dir/cxx)" -ge 3

# ---- the op of "how to add an op": its lines in a copy of the header, and its gradient
formula=$(sed -n 's/^ *\(X(softplus, .*\)$/\1/p' $dir/manual.txt)
row=$(sed -n 's/^ *\(EXF__[A-Z]*(softplus.*\)$/\1/p' $dir/manual.txt)
mkdir -p $dir/op
sed -n '/^ *static exf_real exf__softplus/,/^ *}$/p' $dir/manual.txt > $dir/op/helper.txt
awk -v formula="$formula" -v row="$row" -v helper=$dir/op/helper.txt '
  /^#define EXF__FORMULAS/ { while ((getline line < helper) > 0) print line }
  /^  X\(sigmoid, / { print "  " formula " \\" }
  { print }
  /^EXF__[A-Z]+\(sigmoid/ { print row }
  / \*exf_sigmoid\(exf_ctx/ && !api++ {
    print "EXF_API exf_tensor *exf_softplus(exf_ctx *ctx, exf_tensor *x);" }
  ' exfusion.h > $dir/op/exfusion.h
cat > $dir/op/op.c <<'END'
#include <stdio.h>
#define EXFUSION_IMPLEMENTATION
#include "exfusion.h"
int main(void) {
  exf_ctx *ctx = exf_ctx_new(NULL);
  exf_tensor *x = exf_grad_keep(ctx, exf_tensor_new(ctx, exf_shape1(1), NULL));
  exf_tensor *y = exf_softplus(ctx, x);
  if (exf_backward(ctx, y) == EXF_OK) printf("%.4f %.4f", exf_item(y), x->grad[0]);
  exf_ctx_free(ctx);
}
END
expect "the op compiles" "${CC:-cc}" -std=c99 -Wall -Wextra -I$dir/op $dir/op/op.c \
  -o $dir/op/op -lm
expect "the op works" test "$($dir/op/op)" = "0.6931 0.5000"

# ---- names: functions and macros in the header without its manual (output of programs,
# in plain blocks of README.md, left out; exf_foo is an example). Of "was, is" the left
# column: what is written with its arguments or members is still there, the rest is not.
awk '/^```c$/ { on = 0; code = 1; next } /^```/ { if (code) code = 0; else on = !on; next } !on' \
  README.md > $dir/readme.txt
sed -e '/---- WAS, IS/,$ s/^     [^ ].*   *\([^ ].*\)$/\1/' $dir/manual.txt > $dir/is.txt
sed -n -e '/---- WAS, IS/,$ s/^     \([^ ].*\)   *[^ ].*$/\1/p' $dir/manual.txt > $dir/was.txt
for name in $(grep -o -E 'exf_[a-z0-9_]+[(.]?' $dir/was.txt | sort -u); do
  case $name in *[\(.]) there=1 ;; *) there=0 ;; esac
  if [ $there = "$(grep -q -w -e "${name%[(.]}" $dir/code.h && echo 1 || echo 0)" ]; then ok
  else bad "was, is: $name"; fi
done
expect "was, is names functions" test "$(grep -c '' $dir/was.txt)" -gt 15
for doc in $dir/is.txt $dir/readme.txt; do
  n=0
  for name in $(grep -o -E '\b(exf_[a-z0-9_]+|EXF_[A-Z0-9_]+)' $doc | sort -u); do
    case $name in *_ | exf_foo | exf__*) continue ;; esac
    n=$((n + 1))
    if grep -q -w -e "$name" $dir/code.h; then ok; else bad "$doc names $name, which is not there"; fi
  done
  if [ $n -lt 10 ]; then bad "$doc: only $n names of the library found"; fi
done
for name in $(grep -o -E '\bexf__[A-Za-z0-9_]+' $dir/manual.txt | grep -v -e foo -e softplus | sort -u); do
  if grep -q -w -e "$name" $dir/code.h; then ok; else bad "the manual names $name"; fi
done

# ---- tags (whether the contents have all of them: test_house)
sed -n -E 's/^(\/\* |   )(----|====).*[ -](>>[A-Za-z0-9_-]+)( \*\/)?$/\3/p' exfusion.h \
  | sort > $dir/tags
expect "there are tags" test "$(grep -c '' $dir/tags)" -gt 30
for tag in $(grep -o -E '>>[A-Za-z0-9_-]+' $dir/manual.txt README.md -h | sort -u); do
  if grep -q -x -e "$tag" $dir/tags; then ok; else bad "there is no $tag to go to"; fi
done

# ---- form
expect "the manual has at most 485 lines" test "$(grep -c '' $dir/manual.txt)" -le 485
expect "README.md has at most 200 lines" test "$(grep -c '' README.md)" -le 200
expect "the manual is plain ASCII" sh -c "! LC_ALL=C grep -n '[^ -~]' $dir/manual.txt"
expect "one version" grep -q "version $(sed -n 's/^#define EXF_VERSION "\(.*\)"/\1/p' exfusion.h) " \
  $dir/manual.txt
expect "no heading without a body" awk '
  /^   ---- / || /^#+ / { if (head && !body) { print head; bad = 1 } head = $0; body = 0; next }
  NF { body = 1 }
  END { exit bad || !body }' $dir/manual.txt README.md

# ---- README: files, targets of make, flags of the examples
n=0
for file in $(grep -o -E '(examples|tests|\.ci)/[A-Za-z0-9_./]+' README.md $dir/manual.txt -h \
              | sed 's/\.$//' | sort -u); do
  n=$((n + 1))
  if [ -e "$file" ]; then ok; else bad "there is no $file"; fi
done
expect "README.md names files" test $n -ge 3
n=0
make -s help > $dir/make.help
for target in $(grep -o -E '`?make [a-z]+' README.md | sed 's/.*make //' | sort -u); do
  case $target in
    demo | test | quality | clean | install | help | all | bench) ;;
    *) continue ;;
  esac
  n=$((n + 1))
  if grep -q -E "^$target:" Makefile; then ok; else bad "make has no target $target"; fi
  if grep -q "make $target" $dir/make.help; then ok; else bad "make help has no $target"; fi
done
expect "README.md names targets" test $n -ge 3
for command in train sample eval; do
  build/charlm $command --help > $dir/$command.help 2>&1
  expect "charlm $command --help" test -s $dir/$command.help
done
for command in train eval predict; do
  build/vit $command --help > $dir/vit-$command.help 2>&1
  expect "vit $command --help" test -s $dir/vit-$command.help
done
n=0
for flag in $(grep -o -E '(^|[ `(])--[a-z][a-z0-9-]+' $dir/readme.txt \
              | sed 's/^[^-]*//' | sort -u); do
  n=$((n + 1))
  if [ "$flag" = --help ] || cat $dir/*.help | grep -q -E -e "^ *$flag( |\$)"; then ok
  else bad "no example has a flag $flag"; fi
done
expect "README.md names flags" test $n -ge 3
for flag in $(sed -n '/^demo.*:/,/^$/p' Makefile | grep -o -E ' --?[a-z][a-z-]*' | sort -u); do
  if cat $dir/*.help | grep -q -E -e "^ *$flag "; then ok; else bad "make demo: $flag"; fi
done

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
