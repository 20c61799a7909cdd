#!/bin/sh
# 50 steps of each example, dense and with memory banks, write the same model.safetensors, byte
# for byte, whatever the number of threads and the instruction set; another seed does not.
#   sh tests/test_bits.sh      from the top folder, after `make`
dir=build/bits
rm -rf $dir
mkdir -p $dir
head -c 4000 exfusion.h > $dir/text
passed=0
failed=0

program=build/charlm
train() {   # train OUT FLAGS...
  out=$dir/$1
  shift
  $program train --quiet --quick --data "$data" --steps 50 --eval-every 0 \
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

other() {   # other NAME FLAGS...: the run gives another model than $base
  name=$1
  shift
  if train "$name" "$@" && ! cmp -s "$dir/$base/model.safetensors" \
    "$dir/$name/model.safetensors"; then
    passed=$((passed + 1))
  else
    echo "FAILED $name: it is as $base"
    failed=$((failed + 1))
  fi
}

for ffn in dense mb; do
  data=$dir/text
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
  other $ffn-seed $small --seed 2
done

program=build/vit
data=generated
for ffn in dense mb; do
  small="--ffn $ffn --layers 2 --width 16 --heads 2 --batch 4 --patch 7"
  base=vit-$ffn-auto
  train $base $small --threads 1
  for isa in ref avx2 avx512 neon; do
    same vit-$ffn-$isa $small --threads 3 --isa $isa
  done
  other vit-$ffn-seed $small --seed 2
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
