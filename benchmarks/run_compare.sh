#!/usr/bin/env bash
# The published comparison of methods: docs/results-methods.md. Hours on a GPU, weeks on 2 cores; run it again and it goes on.
#
#     benchmarks/run_compare.sh MODELS DATA OUT [PART...]
#
# MODELS holds a folder for each backbone (e5-12l, mpnet-12l); DATA holds glue/ (RTE, MRPC, SST-2), M-CID/, StackOverflow/ and
# glue_10k/ (samples of QNLI, QQP, MNLI). OUT gets cells/ (to be kept in benchmarks/results/compare/), runs/, compare.json,
# compare.md and compare.png. Parts, each of which stands alone and may run beside the others:
#
#     seed1 seed2 seed3    e5-12l on RTE, MRPC, M-CID, SST-2 and StackOverflow, at most 5,000 training rows each, that seed
#     large                e5-12l on the samples of QNLI, QQP and MNLI, one seed
#     mpnet                mpnet-12l on the five sets, one seed
#
# By default all, one after another. One training leaves a GPU idle most of the time: start this many times at once with the
# same OUT, and each takes cells that no other works on; under NVIDIA's MPS (nvidia-cuda-mps-control -d), without which they
# wait for each other. 15 at a time on an H200: 37 to 53 s for a cell of RTE, 90 s for one of consistent.
#
#     METHODS="deebert consistent" VARIANTS= benchmarks/run_compare.sh ...    # some methods, without variants
#     DRY=--dry-run benchmarks/run_compare.sh ...                             # list the cells only
set -eu

models=${1:?folder of backbones}
data=${2:?folder of data sets}
out=${3:?folder for cells, runs and tables}
shift 3
parts=${*:-seed1 seed2 seed3 large mpnet}

recipes=$(cd "$(dirname "$0")/../recipes" && pwd)
# On our heads and defaults: every method of the table that learns from labels.
methods=${METHODS-$(python -c 'from consistentee.training.methods import METHODS
print(*(name for name, row in METHODS.items() if row.labels and not getattr(row, "needs", ())))')}
# As published: every recipe of recipes/published. And the plain model of fewer layers.
published=$(cd "$recipes/published" 2> /dev/null && ls | grep -v -e static -e released | sed 's/\.yaml$/:published/' || true)
# Others that differ in their settings: why, that file says.
others=$(sed -n 's/^\([a-z_]*:[a-z-]*\):.*/\1/p' "$recipes/../benchmarks/compare_variants.yaml")
settings=(--settings "$recipes/../benchmarks/compare_variants.yaml")
[ -z "${VARIANTS+given}" ] || settings=()
variants=${VARIANTS-static:2 static:3 static:4 static:6 static:8 consistent:released $published $others}

compare() { # BACKBONE SEED WARM-UP_EPOCHS DATA TASK OPTIONS...
  consistentee compare --methods $methods $variants --recipes "$recipes" ${settings[@]+"${settings[@]}"} \
    --backbone "$models/$1" --seeds "$2" \
    --max-accuracy-loss 0 --warmup-epochs "$3" --data-dir "$4" --task "$5" "${@:6}" --output-dir "$out" --discard-models --resamples 2 ${DRY-}
}

five_sets() { # BACKBONE SEED
  local few="--max-train-samples 5000"
  compare "$1" "$2" 3 "$data/glue" rte $few
  compare "$1" "$2" 3 "$data/glue" mrpc $few
  compare "$1" "$2" 6 "$data" m-cid $few
  compare "$1" "$2" 2 "$data/glue" sst2 $few
  compare "$1" "$2" 2 "$data" stackoverflow $few
}

for part in $parts; do
  case $part in
    seed[123]) five_sets e5-12l "${part#seed}" ;;
    large) for task in qnli qqp mnli; do compare e5-12l 1 2 "$data/glue_10k" "$task"; done ;;
    mpnet) five_sets mpnet-12l 1 ;;
    *)
      echo "run_compare.sh: no part $part; there are seed1, seed2, seed3, large and mpnet" >&2
      exit 2
      ;;
  esac
done
[ -z "${DRY-}" ] || exit 0

# Methods as published beside ours, those that share exits included; all on our heads; then everything, last of all, as
# compare.json is to hold it.
show() { # NAME OPTIONS...
  consistentee compare --render --output-dir "$out" --plot "$out/$1.pdf" "${@:2}"
  cp "$out/compare.md" "$out/$1.md"
}
if [ -n "$published" ] && [ -z "${METHODS-}${VARIANTS-}" ]; then
  of=weighted_sum:published
  show published --methods consistent consistent:released $published --also $of/confident_patience $of/similar_patience
  show our-heads --methods $methods --also weighted_sum/confident_patience weighted_sum/similar_patience
fi
consistentee compare --render --criteria all --output-dir "$out"
