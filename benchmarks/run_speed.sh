#!/usr/bin/env bash
# The figures of docs/performance.md, on this machine: about half an hour on 2 cores, or on a GPU with the first argument "gpu".
#
#     benchmarks/run_speed.sh cpu|gpu OUTPUT_FOLDER [MODEL RTE_FOLDER]
#
# MODEL (a saved model, trained or not) and RTE_FOLDER (dev.tsv, train.tsv) are for throughput on text of mixed length.
# Leave the machine alone meanwhile. Then: python benchmarks/render_speed.py OUTPUT_FOLDER
set -eu

where=${1:?cpu or gpu}
out=${2:?folder for the figures}
model=${3:-}
rte=${4:-}
mkdir -p "$out"

measure() { # NAME OPTIONS...
  local name=$1
  shift
  echo "== $name"
  consistentee benchmark "$@" --seed 0 --repeats 5 --json "$out/$name.json" --plot "$out/$name.png"
}

if [ "$where" = gpu ]; then
  for exits in even last; do
    measure "gpu-bert-base-bfloat16-$exits" --config-name bert-base --sequence-length 128 --num-rows 512 \
      --exit-distribution "$exits" --device cuda --dtype bfloat16
  done
  exit
fi

minilm="--config-name minilm-12l-shape --sequence-length 32 --num-rows 128"
base="--config-name bert-base --sequence-length 32"
measure minilm-float32 $minilm
measure minilm-float32-onnxruntime $minilm --backend onnxruntime
measure minilm-float32-narrow-exits $minilm --classifier-hidden-size 64
measure minilm-float32-narrow-exits-onnxruntime $minilm --classifier-hidden-size 64 --backend onnxruntime
measure minilm-bfloat16 $minilm --dtype bfloat16
measure minilm-int8 $minilm --dtype int8 --batch-sizes 1,8,32 --throughput
measure base-float32 $base --num-rows 64 --batch-sizes 1,8,32 --throughput
measure base-float32-onnxruntime $base --num-rows 64 --batch-sizes 1,8,32 --throughput --backend onnxruntime
measure base-bfloat16 $base --num-rows 128 --dtype bfloat16
if [ -n "$model" ]; then
  for dtype in float32 bfloat16; do
    measure "rte-$dtype" "$model" --task rte --data-dir "$rte" --threshold 1 --throughput --num-rows 256 --dtype "$dtype"
  done
fi
