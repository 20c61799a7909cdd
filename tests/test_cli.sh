#!/bin/sh
# The command line of charlm, as a user meets it: errors are one line and name the thing,
# files are complete, runs repeat and resume bit for bit. Before it hello and gpt.
#   sh tests/test_cli.sh      from the top folder, after `make`
charlm=$(pwd)/build/charlm
program=$charlm
dir=build/cli
. tests/cli.sh

# A text with something to learn: 40 kB of counting, in lines.
awk 'BEGIN { for (i = 0; i < 4000; i++) printf "%d is %s.\n", i, i % 2 ? "odd" : "even" }' \
  > $dir/text.txt
tiny="--data $dir/text.txt --layers 2 --heads 2 --width 32 --block 16 --batch 4
      --warmup 5 --eval-every 0 --save-every 0 --threads 1"
train() {   # train OUT FLAGS...
  out=$dir/$1
  shift
  # shellcheck disable=SC2086
  "$charlm" train $tiny --out "$out" --quiet "$@"
}

# ---- hello and gpt
ok "hello" [ "$(build/hello | tail -n 1)" = "dL/dw = 10 20   by hand: 10 20" ]
program=build/gpt
refused "gpt: no file" 2 "^usage: build/gpt TEXTFILE\$"
refused "gpt: two files" 2 "^usage: build/gpt TEXTFILE\$" a b
refused "gpt: no such file" 1 "gpt: $dir/nowhere: No such file" $dir/nowhere
refused "gpt: a folder" 1 "gpt: $dir: " $dir
head -c 500 $dir/text.txt > $dir/short.txt
refused "gpt: a short text" 1 "short.txt: fewer than" $dir/short.txt
# a shorter run of the same program
sed -e 's/STEPS = [0-9]*/STEPS = 100/' -e 's|"\.\./exf|"../../exf|' examples/gpt.c > $dir/gpt.c
object=build/tests/exfusion.o
ok "gpt compiles" sh -c "'${CC:-cc}' -O2 -DEXF__IMPLEMENTED $dir/gpt.c $object -o $dir/gpt -lm \
  || '${CC:-cc}' -O2 -fopenmp -DEXF__IMPLEMENTED $dir/gpt.c $object -o $dir/gpt -lm"
ok "gpt runs" sh -c "$dir/gpt $dir/text.txt > $dir/gpt.out"
ok "gpt learns" awk '/^step/ { loss = $6 } END { exit !(loss > 0 && loss < 2) }' $dir/gpt.out
ok "gpt merges" grep -q '^316232 numbers, 119104 when merged$' $dir/gpt.out
ok "gpt writes" [ "$(sed '1,/merged/d' $dir/gpt.out | wc -c)" = 502 ]
program=$charlm

# ---- the command line
refused "no command" 2 "train"
refused "unknown command" 2 "train" trian
refused "unknown flag" 2 "--steps" train --stpes 3
refused "unknown short word" 2 "extra" train extra
refused "bad number" 2 "steps" train --steps 12x
refused "empty number" 2 "steps" train --steps ""
refused "negative count" 2 "steps" train --steps -3
refused "number too large" 2 "steps" train --steps 99999999999999999999999
refused "bad real" 2 "lr" train --lr fast
refused "NaN" 2 "lr" train --lr nan
refused "missing value" 2 "steps" train --steps
refused "unknown ffn" 2 "dense" train --ffn dens
refused "unknown isa" 2 "avx2" train --isa avx3
refused "unknown upcycle" 2 "zerosum" train --upcycle zerosun
refused "no experts" 2 "experts" train --ffn mb --experts 0
refused "heads do not divide" "1 2" "heads" train --data $dir/text.txt --width 32 --heads 3 \
  --out $dir/never
refused "no such short flag" 2 "unknown flag --n:" train --n 3
refused "only dashes" 2 "unknown flag --:" train --
refused "empty --out" 2 "--out is empty: name a folder" train --out= --data $dir/none
refused "dropout of 1" 2 "dropout" train --dropout 1
refused "batch 0" 2 "batch" train --batch 0
ok "nothing was written" [ ! -e $dir/never ]
ok "--help" sh -c "'$charlm' --help | grep -q train"
ok "--help tells of thinned rows" sh -c "'$charlm' train --help \
  | grep -q 'weights.csv thins'"
ok "train --help" sh -c "'$charlm' train --help | grep -q -e --upcycle"

# ---- data and folders
: > $dir/empty.txt
printf 'short' > $dir/short.txt
refused "empty data" 1 "empty" train --data $dir/empty.txt --out $dir/never
refused "short data" 1 "block" train --data $dir/short.txt --out $dir/never
refused "missing data" 1 "nowhere.txt" train --data $dir/nowhere.txt --out $dir/never
refused "block longer than the split" "1 2" "block" train --data $dir/text.txt \
  --block 100000 --out $dir/never
refused "folder below a file" 1 "text.txt" train --data $dir/text.txt \
  --out $dir/text.txt/x --steps 1
refused "missing config" 1 "nowhere.txt" train --config $dir/nowhere.txt

if [ "$(id -u)" != 0 ]; then
  mkdir $dir/locked
  chmod a-w $dir/locked
  refused "folder in a locked one" 1 "x (Permission denied)" train --data $dir/text.txt \
    --out $dir/locked/x
elif [ -d /sys/kernel ] && ! mkdir /sys/exf 2> $dir/sys.err; then
  refused "folder in /sys" 1 "$(sed 's/.*: \(.*\)/exf (\1)/' $dir/sys.err)" train \
    --data $dir/text.txt --out /sys/exf
else
  echo "skipped a locked folder: nothing is locked for root"
fi

# ---- flags in a file
config() {   # config NAME STATUS TEXT WORDS: a file of these words, with printf's escapes
  printf -- "$4" > $dir/config.txt
  refused "config: $1" "$2" "config.txt: $3" train --config $dir/config.txt
}
config "a choice" 2 "--ffn 'foo' is unknown: the choices are dense|sw" 'ffn foo\n'
config "an unknown flag" 2 "unknown flag stpes: did you mean --steps" 'seed 3\nstpes 2\n'
config "another unknown flag" 2 "unknown flag --step: did you mean --steps" '--step 2\n'
config "nothing like a flag" 2 "unknown flag @@@@: see --help" '@@@@'
config "no value" 2 "--steps takes a whole number .*not ''" 'steps'
config "two blanks" 2 "--steps takes a whole number .*not ' 2'" 'steps  2\n'
config "a number and more" 2 "--steps takes a whole number .*not '2 3'" 'steps 2 3\n'
config "a number out of range" 2 "--lr takes a number from 0 to 1000000, not '1e99'" 'lr 1e99'
config "not a number" 2 "--lr takes a number .*not 'nan'" 'lr nan'
config "a negative count" 2 "--steps takes a whole number .*not '-1'" 'steps -1'
config "neither true nor false" 2 "--routed 'yes' is unknown: .* false|true" 'routed yes'
config "a flag twice" 1 "steps stands there twice" 'steps 2\nlr 1\nsteps 2\n'
config "a flag twice, the same, given too" 1 "lr stands there twice" 'lr 1\n\n#x\nlr 1'
config "a zero byte" 1 "byte 9 is zero" 'steps 2\n\t\0junk'
config "a file of another kind" 1 "byte 8 is zero" '\211PNG\r\n\032\n\0\0\0\rIHDR'
config "letters of another kind" 2 "unknown flag .*: see --help" '\377\376\001 1\n'
config "JSON of version 0.1.0" 1 "JSON, of version 0.1.0" '{\n  "steps": 2\n}\n'
config "a cut line" 2 "unknown flag st: did you mean --steps" 'lr 1\nst'

# ---- a run and its files
ok "sw trains" train one --steps 30 --ffn sw --experts 3 --seed 5
for f in model.safetensors checkpoint.safetensors run.txt weights.csv log.csv summary.json
do ok "it leaves $f" test -s $dir/one/$f; done
ok "no temporary files stay" sh -c "! ls -A $dir/one | grep -v -e '^model.safetensors$' \
  -e '^checkpoint.safetensors$' -e '^run.txt$' -e '^weights.csv$' -e '^log.csv$' \
  -e '^summary.json$'"
ok "log header" [ "$(head -n 1 $dir/one/log.csv)" = \
  step,train_loss,val_loss,lr,grad_norm,tokens_per_s,elapsed_s ]
ok "log rows" [ "$(wc -l < $dir/one/log.csv)" = 31 ]
ok "log steps from 0" [ "$(sed -n '2s/,.*//p' $dir/one/log.csv)" = 0 ]
ok "val_loss only where measured" [ "$(cut -d, -f3 $dir/one/log.csv | grep -c .)" = 2 ]
ok "weights header" [ "$(head -n 1 $dir/one/weights.csv)" = step,ffn,w0,w1,w2 ]
for f in task ffn experts steps seed params_train params_merged train_loss val_loss \
  val_loss_merged merge_max_abs_diff merge_gap ms_per_step tokens_per_s peak_rss_bytes isa \
  threads
do ok "summary has $f" [ -n "$(field $f $dir/one/summary.json)" ]; done
ok "quiet prints nothing" [ -z "$(train quiet --steps 2 2>&1)" ]
ok "loss falls" awk -F, 'NR == 2 { first = $2 } END { exit !($2 < first - 0.4) }' \
  $dir/one/log.csv

# ---- the same bits
ok "again" train two --steps 30 --ffn sw --experts 3 --seed 5
ok "a run repeats" same_run $dir/one $dir/two
ok "checkpoints repeat" same $dir/one/checkpoint.safetensors $dir/two/checkpoint.safetensors
ok "--flag=value" train three --steps=30 --ffn=sw --experts=3 --seed=5
ok "it is the same run" same_run $dir/one $dir/three
ok "another seed" train four --steps 30 --ffn sw --experts 3 --seed 6
ok "it is another run" sh -c "! cmp -s $dir/one/model.safetensors $dir/four/model.safetensors"
ok "--threads 2" train five --steps 30 --ffn sw --experts 3 --seed 5 --threads 2
ok "threads change nothing" same_run $dir/one $dir/five
ok "evaluation" train six --steps 30 --ffn sw --experts 3 --seed 5 --eval-every 7 \
  --save-every 4
ok "it changes nothing" same $dir/one/model.safetensors $dir/six/model.safetensors
ok "--config" "$charlm" train --config $dir/one/run.txt --out $dir/seven --quiet
ok "run.txt repeats the run" same_run $dir/one $dir/seven
ok "its flags, but for the folder" [ "$(grep -v '^out ' $dir/one/run.txt)" = \
  "$(grep -v '^out ' $dir/seven/run.txt)" ]
{ echo '# a comment'; echo; tr '\n' '\r' < $dir/one/run.txt | sed 's/\r/\r\n/g'; } \
  > $dir/dos.txt
ok "--config with comments and CR LF" "$charlm" train --config $dir/dos.txt \
  --out $dir/dos --quiet
ok "it is the same run, too" same_run $dir/one $dir/dos
ok "a flag goes before --config" "$charlm" train --steps 3 --config $dir/one/run.txt \
  --out $dir/eight --quiet
ok "its steps" [ "$(field steps $dir/eight/summary.json)" = 3 ]
case $(field isa $dir/one/summary.json) in
  avx2 | avx512 | neon)
    ok "--isa ref" train ref --steps 30 --ffn sw --experts 3 --seed 5 --isa ref
    ok "the reference has the same bits" same_run $dir/one $dir/ref ;;
  *) echo "skipped isa: no instruction set with fused multiply-add" ;;
esac
ok "sequential order" train seq --steps 5 --order sequential
ok "accumulation" train accum --steps 5 --accum 3 --ffn mb
ok "log rows are steps" [ "$(wc -l < $dir/accum/log.csv)" = 6 ]

# ---- every variant merges to itself
n=0
for flags in "--ffn dense" "--ffn sw" "--ffn dw" "--ffn dw --dw softmax" "--ffn mb" \
  "--ffn mb --routed" "--ffn mb --bias 1 --dropout 0.1" "--ffn dw --upcycle drop"; do
  n=$((n + 1))
  # shellcheck disable=SC2086
  ok "$flags" train v$n --steps 20 --experts 3 $flags
  s=$dir/v$n/summary.json
  ok "$flags: merge difference 0" [ "$(field merge_max_abs_diff $s)" = 0 ]
  ok "$flags: merged parameters" [ "$(field params_merged $s)" = \
    "$(field params_merged $dir/v$((n == 7 ? 7 : 1))/summary.json)" ]
  ok "$flags: losses agree" [ "$(field val_loss $s)" = "$(field val_loss_merged $s)" ]
  ok "$flags: no expert in the model" sh -c "! grep -q -a -i expert $dir/v$n/model.safetensors"
done
dense=$(field params_merged $dir/v1/summary.json)
# 13 different bytes at least: the count by formula, V from the vocabulary's bytes
V=$(od -An -v -tu1 -w1 $dir/text.txt | sort -u | wc -l)
ok "dense parameters by formula" [ "$dense" = \
  $((V * 32 + 16 * 32 + 2 * (4 * 32 * 32 + 8 * 32 * 32 + 2 * 32) + 32)) ]

# ---- steps 0, init, finished runs
ok "--steps 0" train zero --steps 0 --ffn mb --seed 9
ok "it writes the model" test -s $dir/zero/model.safetensors
ok "it writes the checkpoint" test -s $dir/zero/checkpoint.safetensors
ok "a dense model" train dense --steps 40 --ffn dense
ok "--init upcycles it" train init --steps 0 --ffn mb --experts 4 \
  --init $dir/dense/model.safetensors
ok "upcycling preserves the loss" awk "BEGIN { d = $(field val_loss $dir/init/summary.json) \
  - $(field val_loss $dir/dense/summary.json); exit !(d < 1e-5 && d > -1e-5) }"
refused "--init with another width" 2 "width" train --data $dir/text.txt --out $dir/never \
  --init $dir/dense/model.safetensors --width 64 --quiet
refused "--resume without a checkpoint" 1 "checkpoint" train --resume --out $dir/nothing
cp -r $dir/one $dir/done
ok "--resume of a finished run" "$charlm" train --resume --out $dir/done --quiet
for f in model.safetensors checkpoint.safetensors run.txt weights.csv log.csv summary.json
do ok "it leaves $f unchanged" same $dir/one/$f $dir/done/$f; done
refused "--resume with another lr" "1 2" "lr" train --resume --out $dir/done --lr 0.5
refused "--resume with another ffn" "1 2" "ffn" train --resume --out $dir/done --ffn dw

# ---- the folder of another run, or of another machine
cp -r $dir/one $dir/over
( trap '' XFSZ; ulimit -f 300
  train over --steps 3 --ffn sw --experts 3 --seed 6 2> $dir/over.err )
ok "its checkpoint does not fit" grep -q 'checkpoint.*: cannot write' $dir/over.err
refused "that of the other run is gone" 1 "nothing to resume" train --resume \
  --out $dir/over
cp -r $dir/one $dir/full
( trap '' XFSZ; ulimit -f 100; train full --steps 3 --seed 6 2> $dir/over.err )
ok "its model does not fit" grep -q 'model.safetensors: cannot write' $dir/over.err
ok "the other run's stays, alone" [ "$(ls $dir/full)" = model.safetensors ]
ok "as it was" same $dir/one/model.safetensors $dir/full/model.safetensors
cp -r $dir/one $dir/moved
other=neon
if [ "$(field isa $dir/one/summary.json)" = neon ]; then other=avx2; fi
ok "run.txt keeps auto" grep -q '^isa auto$' $dir/one/run.txt
sed "s/^isa auto/isa $other/" $dir/one/run.txt > $dir/moved/run.txt
refused "another machine's isa" 2 "--isa $other is not available" train \
  --config $dir/moved/run.txt --out $dir/never
(cd $dir && "$charlm" train --quiet --data text.txt --block 16 --width 32 --layers 1 \
  --heads 2 --steps 1 --eval-every 0 --out relative)
refused "data by a relative name" 1 "say with --data where" eval $dir/relative
ok "--data says where" "$charlm" eval $dir/relative --data $dir/text.txt
sed 's/"exf.step":"1"/"exf.step":"0"/' $dir/relative/checkpoint.safetensors \
  > $dir/relative/x && mv $dir/relative/x $dir/relative/checkpoint.safetensors
refused "resumed elsewhere" 1 "say with --data where" train --resume --out $dir/relative
ok "no factor above 1" sh -c "'$charlm' train --data $dir/text.txt --quick --steps 1 \
  --lr 9 --weight-decay 9 --warmup 0 --out $dir/factor > $dir/factor.out; \
  grep -q '^run ' $dir/factor.out && ! grep -q decay $dir/factor.out"

# ---- stopping and going on
long="--steps 1500 --ffn mb --experts 3 --dropout 0.1"
# shellcheck disable=SC2086
train whole $long --save-every 100
if command -v timeout > /dev/null 2>&1; then
  # shellcheck disable=SC2086
  timeout --preserve-status -s INT 0.4 "$charlm" train $tiny $long --out $dir/parts \
    --quiet > $dir/int.out 2>&1
  status=$?
  rows=$(wc -l < $dir/parts/log.csv 2> /dev/null || echo 0)
  if [ $status = 0 ]; then echo "skipped Ctrl-C: the run was too fast"
  elif [ ! -s $dir/parts/log.csv ]; then
    echo "skipped stopping: it was stopped before it began"
  else
    ok "Ctrl-C exits with 130" [ $status = 130 ]
    ok "it came before the end" [ "$rows" -lt 1501 ]
    ok "a checkpoint is there" test -s $dir/parts/checkpoint.safetensors
  fi
  if [ -s $dir/parts/log.csv ]; then
    # killed outright, then resumed from what was saved last
    timeout -s KILL 0.4 "$charlm" train --resume --out $dir/parts --save-every 20 --quiet \
      > /dev/null 2>&1
    ok "--resume" "$charlm" train --resume --out $dir/parts --quiet --threads 2
    ok "as if never stopped" same_run $dir/whole $dir/parts
    ok "the same checkpoint" same $dir/whole/checkpoint.safetensors \
      $dir/parts/checkpoint.safetensors
  fi
else
  echo "skipped stopping: no timeout command"
fi

# ---- a loss that explodes keeps the last good checkpoint
# shellcheck disable=SC2086
"$charlm" train $tiny --out $dir/nan --steps 40 --lr 1000000 --clip 0 --warmup 0 --quiet \
  > $dir/nan.out 2>&1
status=$?
ok "NaN ends with 1" [ $status = 1 ]
ok "NaN names the step" grep -q 'step' $dir/nan.out
cp -r $dir/one $dir/explodes
# shellcheck disable=SC2086
refused "another run's checkpoint is not promised" 1 "input$" train $tiny --steps 40 \
  --lr 1000000 --clip 0 --warmup 0 --quiet --out $dir/explodes
ok "nor is it touched" same $dir/one/checkpoint.safetensors \
  $dir/explodes/checkpoint.safetensors
# shellcheck disable=SC2086
refused "its own is" 1 "kept: .*nan/checkpoint" train $tiny --steps 40 --lr 1000000 \
  --clip 0 --warmup 0 --quiet --out $dir/nan --save-every 1

# ---- model files
model=$dir/one/model.safetensors
ok "info" sh -c "'$charlm' info $model | grep -q 32"
ok "eval" "$charlm" eval $dir/one --data $dir/text.txt
ok "eval prints the merged loss" sh -c "'$charlm' eval $dir/one --data $dir/text.txt \
  | grep -q '$(field val_loss_merged $dir/one/summary.json | cut -c1-6)'"
ok "sample" "$charlm" sample $dir/one -n 50
"$charlm" sample $dir/one -n 50 --seed 3 --prompt 1 > $dir/s1.txt 2> /dev/null
"$charlm" sample $model -n 50 --seed 3 --prompt 1 > $dir/s2.txt 2> /dev/null
"$charlm" sample $model -n 50 --seed 4 --prompt 1 > $dir/s3.txt 2> /dev/null
ok "samples repeat" same $dir/s1.txt $dir/s2.txt
ok "seeds differ" sh -c "! cmp -s $dir/s1.txt $dir/s3.txt"
ok "n characters" [ "$(wc -c < $dir/s1.txt)" -ge 50 ]
ok "greedy" "$charlm" sample $model -n 20 --temperature 0
ok "top-k and top-p" "$charlm" sample $model -n 20 --top-k 3 --top-p 0.5
refused "prompt outside the vocabulary" 1 "64" sample $model --prompt @
refused "prompt of two bytes" 1 "byte 1, of code 195," sample $model \
  --prompt "$(printf '1\303\274')"
refused "empty place" 2 "name a run's folder or a model" sample ""
refused "no such place" 1 "name a run's folder or a model" sample $dir/nowhere
ok "info of a folder" "$charlm" info $dir/one
ok "--init of a folder" train folder --steps 0 --init $dir/dense
for command in "eval $dir/one" "info $model" "--help" "train --help"; do
  # shellcheck disable=SC2086
  lost "$command, lost" $command
done
lost "a whole run, lost" train --data $dir/text.txt --quick --steps 1 --out $dir/lost
tab=$(printf '\t')
"$charlm" train --data $dir/text.txt --quick --steps 1 --out "$dir/my '${tab}runs" \
  > $dir/quoted.out
ok "commands can be pasted" grep -q "sample '$dir/my '\\\\''?runs'\$" $dir/quoted.out
ok "no control character is printed" sh -c "! grep -q '$tab' $dir/quoted.out"
nan_weights $model > $dir/nan.safetensors
refused "NaN is no loss" 1 "nan.safetensors: .*not finite" eval $dir/nan.safetensors \
  --data $dir/text.txt
refused "nor a text" 1 "nan.safetensors: .*nan" sample $dir/nan.safetensors
refused "nor a start" 1 "validation loss is not finite" train --data $dir/text.txt \
  --init $dir/nan.safetensors --steps 0 --quiet --out $dir/nan-init
ok "it is not saved" test ! -e $dir/nan-init/model.safetensors
sed 's/{\\"n_layer\\"/(\\"n_layer\\"/' $model > $dir/config.safetensors
refused "exf.config is no object" 1 "config.safetensors: exf.config is not" sample \
  $dir/config.safetensors
sed 's/\\"n_head\\":2,\\"n_embd\\":32/\\"n_head\\":-2,\\"n_embd\\":2/' $model \
  > $dir/heads.safetensors
refused "heads below 0" 1 "heads.safetensors: exf.config has -2 for n_head" sample \
  $dir/heads.safetensors
# a file of somebody else's: the tensors alone
sed 's/exf.vocab/exf.vocaX/; s/n_head/n_heaX/' $dir/dense/model.safetensors \
  > $dir/foreign.safetensors
refused "no heads in the file" 1 "foreign.safetensors .*heads" sample $dir/foreign.safetensors
refused "nor a guess" 1 "foreign.safetensors .*--heads" train --data $dir/text.txt --quiet \
  --out $dir/never --init $dir/foreign.safetensors
ok "--init with --heads reads it" train foreign --steps 0 --ffn dense \
  --init $dir/foreign.safetensors
ok "and completes it" test "$("$charlm" sample $dir/foreign -n 60)" \
  = "$("$charlm" sample $dir/dense -n 60)"
sed 's/h.1.ln_2.weight/h.1.ln-2.weight/' $model > $dir/other.safetensors
refused "a tensor that is not the model's" 1 "other.safetensors: tensor " sample \
  $dir/other.safetensors
head -c 3000 $model > $dir/cut.safetensors
head -c 5 $model > $dir/stub.safetensors
printf '<!DOCTYPE html><html>no</html>' > $dir/html.safetensors
cp $model $dir/longer.safetensors
printf 'x' >> $dir/longer.safetensors
refused "truncated model" 1 "cut.safetensors" info $dir/cut.safetensors
refused "stub of a model" 1 "stub.safetensors" sample $dir/stub.safetensors
refused "a web page" 1 "html" info $dir/html.safetensors
refused "trailing bytes" 1 "1 byte" info $dir/longer.safetensors
refused "missing model" 1 "gone" sample $dir/gone.safetensors
refused "text as a model" 1 "text.txt" info $dir/text.txt
cp -r $dir/one $dir/broken
head -c 4000 $dir/one/checkpoint.safetensors > $dir/broken/checkpoint.safetensors
refused "truncated checkpoint" 1 "checkpoint" train --resume --out $dir/broken

# ---- --quick, and the real text
ok "--quick" "$charlm" train --quick --out $dir/quick --data $dir/text.txt --threads 1
for f in model.safetensors checkpoint.safetensors run.txt weights.csv log.csv summary.json
do ok "--quick leaves $f" test -s $dir/quick/$f; done
text=../shared/data/tinyshakespeare.txt
if [ -f $text ]; then
  ok "tiny Shakespeare" "$charlm" train --data $text --out $dir/real --steps 100 --quiet \
    --eval-every 0 --save-every 0 --lr 4e-3 --warmup 20 --threads 1
  ok "it learns" awk "BEGIN { exit !($(field val_loss_merged $dir/real/summary.json) < 2.7) }"
  ok "0.80 M parameters" [ "$(field params_merged $dir/real/summary.json)" = 804096 ]
else
  echo "skipped tiny Shakespeare: the text is not there"
fi

echo "$passed passed, $failed failed"
[ $failed = 0 ]
