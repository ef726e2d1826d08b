#!/usr/bin/env bash
# The speed figures of docs/results-generation.md, on this machine: about 20 minutes on 2 cores, 10 on a GPU.
#
#     benchmarks/run_generation_speed.sh cpu|gpu OUTPUT_FOLDER [MODEL ALPACA_FOLDER]
#
# MODEL (a trained model with exits) and ALPACA_FOLDER are for lossless decoding beside Hugging Face's own.
# Leave the machine alone meanwhile. Then: python benchmarks/render_generation.py
set -eu

where=${1:?cpu or gpu}
out=${2:?folder for the figures}
model=${3:-}
alpaca=${4:-}
mkdir -p "$out"

measure() { # NAME OPTIONS...
  local name=$1
  shift
  echo "== $name"
  consistentee benchmark "$@" --seed 0 --json "$out/$name.json" --plot "$out/$name.png"
}

if [ "$where" = gpu ]; then
  # Half of the layers saved, by force, and exits that nobody takes; one text and 32 at once.
  half=$(python3 -c 'print(",".join(["0.0"] * 7 + ["1.0"] + ["0.0"] * 8))')
  for exits in "$half" even last; do
    label=$([ "$exits" = "$half" ] && echo half || echo "$exits")
    measure "gpu-llama-1b-bfloat16-$label" --config-name llama-1b-shape --exit-distribution "$exits" \
      --batch-sizes 1,32 --device cuda --dtype bfloat16 --new-tokens 128 --repeats 5
  done
  exit
fi

for dtype in float32 bfloat16; do
  measure "smollm2-$dtype" --config-name smollm2-135m-shape --dtype "$dtype" --new-tokens 128 --repeats 2
done
measure smollm2-float32-one-text --config-name smollm2-135m-shape --batch-sizes 1 --new-tokens 128 \
  --repeats 3
measure smollm2-float32-margin --config-name smollm2-135m-shape --criterion softmax_margin --batch-sizes 1 --new-tokens 64 \
  --repeats 2
if [ -n "$model" ]; then
  trained=(--task alpaca --data-dir "$alpaca" --lossless --new-tokens 64)
  measure alpaca-float32 "$model" "${trained[@]}" --batch-sizes 1,8 --num-rows 8 --repeats 2
  measure alpaca-float32-batch-32 "$model" "${trained[@]}" --batch-sizes 32 --num-rows 32 --repeats 3
fi
