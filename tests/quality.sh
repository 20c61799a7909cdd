#!/bin/sh
# The table of variants: merged validation loss over the full split, seeds 1-3, at two
# learning rates (cosine to a tenth). Finished runs in build/quality are kept, so the
# script may be stopped and called again; it prints the table of what is there.
#   sh tests/quality.sh DATA [JOBS]
data=$1
jobs=${2:-1}
charlm=build/charlm
top=build/quality
if [ ! -f "$data" ]; then
  echo "make quality: give the text to train on: make quality DATA=FILE" >&2
  exit 2
fi
mkdir -p $top
seeds="1 2 3"
rates="1e-3 4e-3"
variants="dense scaled sw dw-raw dw-softmax mb mb-routed"

flags_of() {
  case $1 in
    dense) echo "--ffn dense" ;;
    scaled) echo "--ffn dw --dw raw --experts 1" ;;
    sw) echo "--ffn sw --experts 4" ;;
    dw-raw) echo "--ffn dw --dw raw --experts 4" ;;
    dw-softmax) echo "--ffn dw --dw softmax --experts 4" ;;
    mb) echo "--ffn mb --experts 4" ;;
    mb-routed) echo "--ffn mb --experts 4 --routed" ;;
  esac
}
title_of() {
  case $1 in
    dense) echo "dense" ;;
    scaled) echo "dense, one learned scalar (dw raw, N = 1)" ;;
    sw) echo "sw" ;;
    dw-raw) echo "dw raw" ;;
    dw-softmax) echo "dw softmax" ;;
    mb) echo "mb" ;;
    mb-routed) echo "mb routed" ;;
  esac
}
min_of() { awk "BEGIN { printf \"%g\", $1 / 10 }"; }

# Two or more runs at a time take one thread each: the bits are the same.
threads=""
if [ "$jobs" -gt 1 ]; then threads="--threads 1"; fi
running=0
for rate in $rates; do
  for seed in $seeds; do
    for v in $variants; do
      out=$top/$v-$rate-$seed
      if [ -s $out/summary.json ]; then continue; fi
      echo "$v, lr $rate, seed $seed" >&2
      # shellcheck disable=SC2046,SC2086
      $charlm train --data "$data" --out $out.part $(flags_of $v) --seed $seed --lr $rate \
        --min-lr $(min_of $rate) --eval-every 0 --save-every 0 --quiet $threads \
        && rm -rf $out && mv $out.part $out &
      running=$((running + 1))
      if [ $running -ge "$jobs" ]; then
        wait
        running=0
      fi
    done
  done
done
wait

field() { tr ',{}' '\n\n\n' < "$2" | sed -n "s/^[ \"]*$1\"[ ]*:[ ]*\"*\([^\" ]*\).*/\1/p"; }
for rate in $rates; do
  echo
  echo "Merged validation loss in nats, lr $rate to $(min_of $rate), N = 4, \`$(basename "$data")\`:"
  echo
  echo "| variant | seed 1 | seed 2 | seed 3 | mean |"
  echo "|---|---|---|---|---|"
  for v in $variants; do
    line="| $(title_of $v) |"
    losses=""
    for seed in $seeds; do
      s=$top/$v-$rate-$seed/summary.json
      loss=""
      if [ -s $s ]; then loss=$(field val_loss_merged $s); fi
      losses="$losses $loss"
      line="$line $(echo "$loss" | awk '{ if ($1 != "") printf "%.3f", $1; else print "-" }') |"
    done
    mean=$(echo "$losses" | awk '{ for (i = 1; i <= NF; i++) s += $i
      if (NF) printf "%.3f", s / NF; else print "-" }')
    echo "$line $mean |"
  done
done
