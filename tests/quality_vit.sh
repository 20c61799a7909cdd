#!/bin/sh
# The table of the ViT: default configuration on Fashion-MNIST, dense and mb with 4
# experts, seeds 1-3. Finished runs in build/quality-vit are kept, so the script may be
# stopped and called again; it prints the table of what is there.
#   sh tests/quality_vit.sh [DATA]
data=$1
vit=build/vit
top=build/quality-vit
mkdir -p $top
for seed in 1 2 3; do
  for ffn in mb dense; do
    out=$top/$ffn-$seed
    if [ -s $out/summary.json ]; then continue; fi
    echo "$ffn, seed $seed" >&2
    rm -rf $out.part
    $vit train ${data:+--data "$data"} --out $out.part --ffn $ffn --experts 4 \
      --seed $seed --eval-every 0 --save-every 0 --quiet && rm -rf $out && mv $out.part $out
  done
done

field() { tr ',{}' '\n\n\n' < "$2" | sed -n "s/^[ \"]*$1\"[ ]*:[ ]*\"*\([^\" ]*\).*/\1/p"; }
cell() {   # cell FIELD FFN SEED: in per cent, or -
  s=$top/$2-$3/summary.json
  if [ -s $s ]; then field $1 $s | awk '{ printf "%.2f", 100 * $1 }'; else printf -- -; fi
}
seconds() {
  l=$top/$1-$2/log.csv
  if [ -s $l ]; then tail -n 1 $l | awk -F, '{ printf "%.0f", $7 }'; else printf -- -; fi
}
echo
echo "Accuracy of the merged model in per cent (seconds of training, all processors):"
echo
echo "| FFNs | split | seed 1 | seed 2 | seed 3 | mean |"
echo "|---|---|---|---|---|---|"
for ffn in dense mb; do
  for split in val test; do
    line="| $ffn | $split |"
    sum=""
    for seed in 1 2 3; do
      c=$(cell ${split}_accuracy_merged $ffn $seed)
      sum="$sum $c"
      if [ $split = test ]; then c="$c ($(seconds $ffn $seed) s)"; fi
      line="$line $c |"
    done
    echo "$line $(echo "$sum" | awk '{ for (i = 1; i <= NF; i++) if ($i != "-") { s += $i; n++ }
      if (n) printf "%.2f", s / n; else print "-" }') |"
  done
done
