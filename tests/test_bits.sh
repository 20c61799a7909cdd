#!/bin/sh
# 50 steps of charlm, dense and with memory banks, write the same model.safetensors, byte
# for byte, whatever the number of threads and the instruction set; another seed does not.
#   sh tests/test_bits.sh      from the top folder, after `make`
dir=build/bits
rm -rf $dir
mkdir -p $dir
head -c 4000 exfusion.h > $dir/text
passed=0
failed=0

train() {   # train OUT FLAGS...
  out=$dir/$1
  shift
  build/charlm train --quiet --quick --data $dir/text --steps 50 --eval-every 0 \
    --save-every 0 --out "$out" "$@" > "$out.log" 2>&1
}
# same NAME FLAGS...: the run gives the model of $base
same() {
  name=$1
  shift
  if train "$name" "$@" && cmp -s "$dir/$base/model.safetensors" \
    "$dir/$name/model.safetensors"; then
    passed=$((passed + 1))
  elif grep -q 'not available' "$dir/$name.log"; then
    echo "skipped $name: not on this processor"
  else
    echo "FAILED $name: it differs from $base"
    failed=$((failed + 1))
  fi
}

for ffn in dense mb; do
  # enough work to be split over threads
  big="--ffn $ffn --layers 1 --width 64 --block 64 --batch 4"
  base=$ffn-threads-1
  train $base $big --threads 1
  for t in 2 3 8; do same $ffn-threads-$t $big --threads $t; done
  small="--ffn $ffn --width 24 --block 16 --batch 3"
  base=$ffn-auto
  train $base $small --threads 1
  for isa in ref avx2 avx512 neon; do
    same $ffn-$isa $small --threads 2 --isa $isa
  done
  train $ffn-seed $small --seed 2
  if cmp -s "$dir/$base/model.safetensors" "$dir/$ffn-seed/model.safetensors"; then
    echo "FAILED $ffn: another seed gives the same bytes"
    failed=$((failed + 1))
  else passed=$((passed + 1)); fi
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
