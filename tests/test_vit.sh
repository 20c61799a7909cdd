#!/bin/sh
# The command line of vit: data of every kind and what is refused of them, files, merge,
# resuming bit for bit; short real trainings on Fashion-MNIST and on a folder of PNG files
# where they can be had.
#   sh tests/test_vit.sh      from the top folder, after `make`
vit=$(pwd)/build/vit
program=$vit
dir=build/vit-test
. tests/cli.sh

# IDX files: 60 and 20 pictures of 8 x 8, whose class is the column pattern
pixels() { awk "BEGIN { for (i = 0; i < $1; i++) for (p = 0; p < 64; p++)
  printf \"%c\", p % 10 == i % 10 ? 120 : 1 + (i * 7 + p * 3) % 40 }"; }
labels() { i=0; while [ $i -lt "$1" ]; do printf '\0\1\2\3\4\5\6\7\10\11'; i=$((i + 10)); done; }
idx=$dir/idx
mkdir -p $idx
{ printf '\0\0\10\3\0\0\0\74\0\0\0\10\0\0\0\10'; pixels 60; } > $idx/train-images-idx3-ubyte
{ printf '\0\0\10\1\0\0\0\74'; labels 60; } > $idx/train-labels-idx1-ubyte
{ printf '\0\0\10\3\0\0\0\24\0\0\0\10\0\0\0\10'; pixels 20; } > $idx/t10k-images-idx3-ubyte
{ printf '\0\0\10\1\0\0\0\24'; labels 20; } > $idx/t10k-labels-idx1-ubyte
tiny="--data $idx --layers 2 --heads 2 --width 16 --patch 4 --batch 7 --eval-every 0
      --save-every 0"
train() {   # train OUT FLAGS...
  out=$dir/$1
  shift
  # shellcheck disable=SC2086
  "$vit" train $tiny --threads 1 --out "$out" --quiet "$@"
}

# ---- the command line
refused "no command" 2 "train"
refused "unknown command" 2 "predict" predikt
refused "unknown flag" 2 "--epochs" train --epoch 3
refused "patch that does not divide" 2 "patch" train --data $idx --patch 3
refused "heads that do not divide" 2 "heads" train --data $idx --patch 4 --heads 5
refused "two sources" 2 "give one" train --data $idx --images $idx
refused "epochs" 2 "epochs" train --epochs many
refused "steps" 2 "whole number from 0" train --steps -3
ok "help says what --size 0 is" sh -c "'$vit' train --help | grep -q 'null or 0:'"
ok "predict: --help anywhere" sh -c "'$vit' predict a b --help | grep -q '^usage'"
refused "predict: unknown flag" 2 "unknown flag --x:" predict a --x b
refused "smoothing" 2 "label-smoothing" train --label-smoothing 1
refused "no model" 2 "usage" eval
refused "no picture" 2 "no picture" predict $dir/one
refused "no such model" 1 "gone" predict $dir/gone.safetensors x.pgm
ok "help lists the flags" sh -c "'$vit' train --help | grep -q -e '--drop-path'"

# ---- IDX files that are refused, with the rule and the place
bad() {   # bad FILE: a copy of the set in $dir/bad, FILE replaced by stdin
  rm -rf $dir/bad
  cp -r $idx $dir/bad
  cat > $dir/bad/$1
}
hostile() {   # hostile NAME TEXT
  refused "$1" 1 "$2" train --data $dir/bad --patch 4 --out $dir/never
  ok "$1: nothing is written" test ! -e $dir/never
}
refused "an empty folder" 1 "train-images-idx3-ubyte" train --data $dir --out $dir/never
printf '' | bad train-images-idx3-ubyte; hostile "empty file" "ends at byte 0"
head -c 3000 $idx/train-images-idx3-ubyte | bad train-images-idx3-ubyte
hostile "cut pictures" "byte 16: the header promises 3,840 numbers, 2,984 bytes follow"
{ cat $idx/train-labels-idx1-ubyte; printf x; } | bad train-labels-idx1-ubyte
hostile "long labels" "byte 8: the header promises 60 numbers, 61 bytes follow"
{ printf '\0\0\10\1\0\0\0\74'; labels 50; printf '\0\1\2\3\4\5\6\7\10\12'; } \
  | bad train-labels-idx1-ubyte
hostile "label out of range" "byte 67: label 10, but there are 10 classes"
{ printf '\0\0\10\1\0\0\0\62'; labels 50; } | bad train-labels-idx1-ubyte
hostile "counts differ" "60 pictures, .* has 50 labels"
{ printf '\0\0\10\1\0\0\0\74'; labels 60; } | bad train-images-idx3-ubyte
hostile "labels as pictures" "byte 3: 1 axes"
printf '\211PNG' | bad train-images-idx3-ubyte; hostile "another kind" "byte 0: two zero"
unpacks=no
if command -v gzip > /dev/null 2>&1; then
  cp -r $idx $dir/packed
  gzip $dir/packed/*
  cp -r $dir/packed $dir/cut
  head -c 100 $dir/packed/train-images-idx3-ubyte.gz > $dir/cut/train-images-idx3-ubyte.gz
  if "$vit" train --data $dir/cut 2>&1 | grep -q 'no stb_image'; then
    refused "gzip without stb_image" 1 \
      "gunzip -k $dir/packed/train-images-idx3-ubyte.gz" train --data $dir/packed
    echo "skipped gzip: this build has no stb_image"
  else
    unpacks=yes
    ok "gzip trains" train packed-run --data $dir/packed --steps 3
    ok "as raw does" train raw-run --steps 3
    ok "gzip and raw are the same" same_run $dir/packed-run $dir/raw-run
    refused "cut gzip" 1 "train-images-idx3-ubyte.gz: gzip: .*cut short" train \
      --data $dir/cut --out $dir/never
  fi
else
  echo "skipped gzip: there is no gzip command"
fi

# ---- a run and its files
ok "it trains" train one --steps 30 --experts 3 --seed 5
for f in model.safetensors checkpoint.safetensors run.txt weights.csv log.csv summary.json
do ok "it leaves $f" test -s $dir/one/$f; done
ok "no temporary files stay" [ "$(ls -A $dir/one | wc -l)" = 6 ]
ok "log header" [ "$(head -n 1 $dir/one/log.csv)" = \
  step,train_loss,val_loss,lr,grad_norm,tokens_per_s,elapsed_s ]
ok "log rows" [ "$(wc -l < $dir/one/log.csv)" = 31 ]
for f in task ffn experts steps seed params_train params_merged train_loss val_loss \
  val_loss_merged merge_max_abs_diff merge_gap ms_per_step tokens_per_s peak_rss_bytes isa \
  threads val_accuracy val_accuracy_merged test_accuracy test_accuracy_merged test_loss \
  test_loss_merged classes images_per_s
do ok "summary has $f" [ -n "$(field $f $dir/one/summary.json)" ]; done
# 60 pictures, 6 of them for validation: 54 / 7 micro-batches
ok "epochs" train epochs --epochs 1.5
ok "steps of 1.5 epochs" [ "$(field steps $dir/epochs/summary.json)" = 12 ]
ok "--epochs 0" train zero --epochs 0
ok "it writes the model" test -s $dir/zero/model.safetensors
ok "parameters by the formula of timm" [ "$(field params_merged $dir/one/summary.json)" = \
  $((16 + 5 * 16 + 16 * 16 + 16 + 2 * (12 * 16 * 16 + 13 * 16) + 2 * 16 + 10 * 17)) ]

# ---- the same bits
ok "--threads 2" train two --steps 30 --experts 3 --seed 5 --threads 2
ok "--threads 3" train three --steps 30 --experts 3 --seed 5 --threads 3 --eval-every 7
ok "threads change nothing" same_run $dir/one $dir/two
ok "nor does evaluation" same $dir/one/model.safetensors $dir/three/model.safetensors
ok "--config" "$vit" train --config $dir/one/run.txt --out $dir/four --quiet
ok "run.txt repeats the run" same_run $dir/one $dir/four
ok "another seed" train five --steps 30 --experts 3 --seed 6
ok "is another run" differ $dir/one/model.safetensors $dir/five/model.safetensors
n=0
for flags in "--augment 0" "--flip 0" "--shift 0" "--label-smoothing 0.3" \
  "--drop-path 0.3" "--order sequential" "--dropout 0.2" "--accum 2"; do
  n=$((n + 1))
  # shellcheck disable=SC2086
  ok "$flags" train other$n --steps 30 --experts 3 --seed 5 $flags
  ok "$flags matters" differ $dir/one/model.safetensors $dir/other$n/model.safetensors
done
n=0
for flags in "--ffn dense" "--ffn sw" "--ffn dw" "--ffn dw --dw softmax" "--ffn mb" \
  "--ffn mb --routed" "--ffn mb --ema 0.9"; do
  n=$((n + 1))
  # shellcheck disable=SC2086
  ok "$flags" train v$n --steps 20 --experts 3 $flags
  s=$dir/v$n/summary.json
  ok "$flags: merge difference 0" [ "$(field merge_max_abs_diff $s)" = 0 ]
  for f in val_loss val_accuracy test_loss test_accuracy; do
    ok "$flags: $f before and after" [ "$(field $f $s)" = "$(field ${f}_merged $s)" ]
  done
  ok "$flags: merged parameters" [ "$(field params_merged $s)" = \
    "$(field params_merged $dir/one/summary.json)" ]
  ok "$flags: no expert in the model" sh -c "! grep -q -a expert $dir/v$n/model.safetensors"
done
ok "the average is a model" "$vit" eval $dir/v7/ema-20.safetensors --data $idx
cp -r $dir/v7 $dir/again
ok "another run in its folder" train again --steps 2
ok "the average is removed" test ! -e $dir/again/ema-20.safetensors
ok "it is another" differ $dir/v7/ema-20.safetensors $dir/v7/model.safetensors

# ---- stopping and going on, in the middle of an epoch
long="--steps 4000 --experts 3 --drop-path 0.1 --ema 0.99 --dropout 0.1"
# shellcheck disable=SC2086
train whole $long --save-every 101
if command -v timeout > /dev/null 2>&1; then
  # shellcheck disable=SC2086
  timeout --preserve-status -s INT 0.5 "$vit" train $tiny $long --threads 1 \
    --out $dir/parts --quiet > $dir/int.out 2>&1
  status=$?
  if [ $status = 0 ]; then echo "skipped Ctrl-C: the run was too fast"
  elif [ ! -s $dir/parts/checkpoint.safetensors ]; then
    echo "skipped stopping: it was stopped before it began"
  else
    ok "Ctrl-C exits with 130" [ $status = 130 ]
  fi
  if [ -s $dir/parts/checkpoint.safetensors ]; then
    timeout -s KILL 0.4 "$vit" train --resume --out $dir/parts --save-every 23 --quiet \
      > /dev/null 2>&1
    ok "--resume" "$vit" train --resume --out $dir/parts --quiet --threads 2
    ok "as if never stopped" same_run $dir/whole $dir/parts
    for f in checkpoint ema-4000; do
      ok "the same $f" same $dir/whole/$f.safetensors $dir/parts/$f.safetensors
    done
  fi
else
  echo "skipped stopping: no timeout command"
fi
ok "--resume of a finished run" "$vit" train --resume --out $dir/whole --quiet
refused "--resume with another lr" 2 "lr" train --resume --out $dir/whole --lr 0.5
cp -r $idx $dir/others
pixels 60 | tr '\170' '\171' > $dir/others.px
{ head -c 16 $idx/train-images-idx3-ubyte; cat $dir/others.px; } \
  > $dir/others/train-images-idx3-ubyte
refused "--resume on other data" 1 "not the data" train --resume --out $dir/whole \
  --data $dir/others

# ---- --init, eval, info, predict
ok "a dense model" train dense --steps 40 --ffn dense
ok "--init upcycles it" train init --steps 0 --init $dir/dense/model.safetensors
ok "upcycling preserves the loss" awk "BEGIN { d = $(field val_loss $dir/init/summary.json) \
  - $(field val_loss $dir/dense/summary.json); exit !(d < 1e-5 && d > -1e-5) }"
refused "--init with another width" 2 "width" train --data $idx --out $dir/never \
  --init $dir/dense/model.safetensors --width 32
ok "eval prints the merged loss" sh -c "'$vit' eval $dir/one \
  | grep -q '^val_loss $(field val_loss_merged $dir/one/summary.json | cut -c1-7)'"
refused "two sources to evaluate" 2 "give one" eval $dir/one --data $idx --images $idx
ok "eval --split test" sh -c "'$vit' eval $dir/one/model.safetensors --data $idx \
  --split test | grep -q '^test_loss .* 20 pictures'"
ok "info" sh -c "'$vit' info $dir/one/model.safetensors | grep -q 'pos_embed'"
ok "info knows mean and deviation" sh -c "'$vit' info $dir/one/model.safetensors \
  | grep -q '\"mean\":\"0\\.'"
{ printf 'P5 8 8 255\n'; pixels 1; } > $dir/zero.pgm
ok "predict" "$vit" predict $dir/dense $dir/zero.pgm $dir/zero.pgm
ok "predict: three classes, twice" [ "$(grep -c '%  ' $dir/ok.out)" = 6 ]
ok "predict: the first is likeliest" awk '/%/ { if (n++ % 3 && $1 > last) exit 1
  last = $1 }' $dir/ok.out
refused "a picture named -" 1 "vit: -: it cannot be read" predict $dir/dense -
lost "predict, lost" predict $dir/dense $dir/zero.pgm
lost "eval, lost" eval $dir/one
nan_weights $dir/one/model.safetensors > $dir/nan.safetensors
refused "NaN is no probability" 1 "nan.safetensors: .*not finite" predict \
  $dir/nan.safetensors $dir/zero.pgm
refused "nor a loss" 1 "nan.safetensors: .*not finite" eval $dir/nan.safetensors \
  --data $idx
ok "--init of a folder" train folder --steps 0 --init $dir/dense
cp -r $dir/one $dir/bad-run
sed 's/^classes 10/classes x/' $dir/one/run.txt > $dir/bad-run/run.txt
refused "a flag of run.txt" 2 "bad-run/run.txt: --classes takes" eval $dir/bad-run
sed 's/^data .*/data gone/' $dir/one/run.txt > $dir/bad-run/run.txt
refused "data that are gone" 1 "gone .*say with --data where" eval $dir/bad-run
printf 'P5 8 8 255\nxx' > $dir/cut.pgm
refused "a cut picture" 1 "cut.pgm: pnm: the file ends at byte 13" predict $dir/dense \
  $dir/cut.pgm
sed 's/exf.labels":"\[/exf.labels":"(/' $dir/one/model.safetensors \
  > $dir/labels.safetensors
refused "labels that are no list" 1 "exf.labels must list" predict $dir/labels.safetensors \
  $dir/zero.pgm
refused "a checkpoint" 1 "is a checkpoint" eval $dir/one/checkpoint.safetensors
refused "a model of another kind" 1 "not a ViT" eval tests/golden/dense.safetensors

# ---- folders of pictures
folder=$dir/pnm
for c in b A a; do
  mkdir -p $folder/$c
  for i in 1 2 3 4 5 6 7 8; do
    { printf 'P5 9 7 255\n'; pixels $i | tail -c 63 | tr '\170' "$c"; } > $folder/$c/$i.pgm
  done
done
small="--size 8 --patch 4 --layers 1 --width 16 --steps 5 --quiet --threads 1"
# shellcheck disable=SC2086
ok "a folder of PNM" "$vit" train --images $folder $small --out $dir/pnm-run
ok "classes sorted by bytes" sh -c "'$vit' info $dir/pnm-run/model.safetensors \
  | grep -q 'exf.labels: \[\"A\",\"a\",\"b\"\]'"
ok "eval finds the folder" "$vit" eval $dir/pnm-run --split train
mkdir -p $dir/splits
cp -r $folder $dir/splits/train
cp -r $folder $dir/splits/val
# shellcheck disable=SC2086
ok "train and val" "$vit" train --images $dir/splits $small --out $dir/splits-run
ok "all of val validates" sh -c "'$vit' eval $dir/splits-run | grep -q ' 24 pictures'"
printf 'P5 9 7 255\nxx' > $folder/a/0.pgm
refused "an unreadable picture" 1 "a/0.pgm: pnm: the file ends at byte 13" train \
  --images $folder --patch 4 --out $dir/never
# shellcheck disable=SC2086
ok "--skip-bad" "$vit" train --images $folder --skip-bad ${small%--quiet*} --threads 1 \
  --out $dir/skip
cp $dir/ok.out $dir/skip.out
ok "it counts them" grep -q '1 could not be read' $dir/skip.out
ln -s nowhere $folder/A/0.pgm
# shellcheck disable=SC2086
ok "--skip-bad of a dangling link" "$vit" train --images $folder --skip-bad \
  ${small%--quiet*} --threads 1 --out $dir/skip
cp $dir/ok.out $dir/skip.out
ok "it counts it" grep -q '2 could not be read' $dir/skip.out
refused "a dangling link" 1 "A/0.pgm: it cannot be read .*--skip-bad" train \
  --images $folder --patch 4 --out $dir/never
rm $folder/A/0.pgm
mkdir $folder/empty
refused "an empty class" 1 "pnm/empty: no picture" train --images $folder --skip-bad \
  --patch 4 --out $dir/never
mkdir -p $dir/lonely/one
cp $folder/b/1.pgm $dir/lonely/one
refused "one class" 1 "two at least" train --images $dir/lonely --out $dir/never
printf '\211PNG\r\n\032\n' > $dir/stub.png
if [ -x build/tests/test_images ] && "$vit" predict $dir/dense $dir/stub.png 2>&1 \
     | grep -q 'PNG, JPEG, BMP and PNM'; then
  build/tests/test_images png $dir/png
  ok "a folder of PNG files" "$vit" train --images $dir/png --out $dir/png-run --patch 7 \
    --width 32 --layers 2 --batch 16 --steps 200 --lr 2e-3 --eval-every 0 --quiet \
    --threads 1
  ok "it learns them" awk "BEGIN { exit !($(field test_accuracy_merged \
    $dir/png-run/summary.json) > 0.8) }"
  ok "in colour" sh -c "'$vit' info $dir/png-run/model.safetensors | grep -q '\[32,3,7,7\]'"
  ok "predict a PNG" "$vit" predict $dir/png-run $dir/png/ring/07.png
else
  ok "without stb_image the message says so" sh -c "'$vit' predict $dir/dense \
    $dir/stub.png 2>&1 | grep -q 'make STB='"
  echo "skipped PNG files: this build has no stb_image"
fi

# ---- generated pictures, Fashion-MNIST (gzip)
ok "generated pictures" "$vit" train --quick --epochs 4 --out $dir/quick --quiet --threads 1
ok "it learns them" awk "BEGIN { exit !($(field test_accuracy_merged \
  $dir/quick/summary.json) > 0.6) }"
if [ $unpacks = no ]; then
  echo "skipped Fashion-MNIST: this build cannot unpack it"
elif [ -f /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz ]; then
  ok "Fashion-MNIST" "$vit" train --out $dir/fashion --patch 7 --width 32 --layers 2 \
    --heads 4 --batch 64 --steps 250 --lr 3e-3 --eval-every 0 --quiet --threads 1
  ok "it learns them" awk "BEGIN { exit !($(field test_accuracy_merged \
    $dir/fashion/summary.json) > 0.6) }"
  ok "5,000 of 60,000 validate" sh -c "'$vit' info $dir/fashion/model.safetensors \
    | grep -q 'Ankle boot' && '$vit' eval $dir/fashion | grep -q ' 5,000 pictures'"
else
  echo "skipped Fashion-MNIST: the Debian package dataset-fashion-mnist is not installed"
fi

echo "$passed passed, $failed failed"
[ $failed = 0 ]
