#!/usr/bin/env bash
# The published comparison of methods: docs/results.md. Hours on a GPU, days on 2 cores; run it again and it goes on.
#
#     benchmarks/run_compare.sh MODELS GLUE M_CID STACKOVERFLOW GLUE_10K OUT [PART...]
#
# MODELS holds a folder for each backbone (e5-12l, mpnet-12l), GLUE those of RTE, MRPC and SST-2, GLUE_10K samples of QNLI,
# QQP and MNLI. OUT gets cells/ (to be kept in benchmarks/results/compare/), runs/, compare.json, compare.md, compare.png.
# Parts, each of which stands alone and may run beside the others: seed1 seed2 seed3 (e5-12l, five sets), large (e5-12l,
# QNLI, QQP, MNLI, one seed), mpnet (mpnet-12l, five sets, one seed). By default all, one after another.
#
#     METHODS="deebert consistent" DRY=--dry-run benchmarks/run_compare.sh ...     # some methods; list the cells only
set -eu

models=${1:?folder of backbones}
glue=${2:?folder of RTE, MRPC and SST-2}
m_cid=${3:?folder of M-CID}
stackoverflow=${4:?folder of StackOverflow}
glue_10k=${5:?folder of QNLI, QQP and MNLI samples}
out=${6:?folder for cells, runs and tables}
shift 6
parts=${*:-seed1 seed2 seed3 large mpnet}

here=$(cd "$(dirname "$0")" && pwd)
# Every method of the table that learns from labels, unless some are named.
methods=${METHODS:-$(python -c 'from consistentee.training.methods import METHODS
print(*(name for name, row in METHODS.items() if row.labels and not getattr(row, "needs", ())))')}
# The plain model of fewer layers, and every method with the heads and settings of its paper.
variants=${VARIANTS-static:2 static:3 static:4 static:6 static:8 consistent:released $(cd "$here/../recipes/published" &&
  ls | grep -v -e static -e released | sed 's/\.yaml$/:published/')}
# Methods that differ in their criterion alone.
also="weighted_sum:published/confident_patience weighted_sum:published/similar_patience"

compare() { # BACKBONE SEED WARM-UP_EPOCHS DATA TASK...
  local backbone=$1 seed=$2 epochs=$3 data=$4
  shift 4
  consistentee compare --methods $methods $variants --recipes "$here/../recipes" --backbone "$models/$backbone" \
    --task "$@" --data-dir "$data" --max-train-samples 5000 --warmup-epochs "$epochs" --seeds "$seed" \
    --output-dir "$out" --discard-models --criteria all ${DRY-}
}

five_sets() { # BACKBONE SEED
  compare "$1" "$2" 3 "$glue" rte mrpc
  compare "$1" "$2" 6 "$m_cid" m-cid
  compare "$1" "$2" 2 "$glue" sst2
  compare "$1" "$2" 2 "$stackoverflow" stackoverflow
}

for part in $parts; do
  case $part in
    seed[123]) five_sets e5-12l "${part#seed}" ;;
    large)
      # all 9,000 rows of the samples
      for task in qnli qqp mnli; do
        consistentee compare --methods $methods $variants --recipes "$here/../recipes" --backbone "$models/e5-12l" \
          --task $task --data-dir "$glue_10k" --warmup-epochs 2 --seeds 1 --output-dir "$out" --discard-models \
          --criteria all ${DRY-}
      done
      ;;
    mpnet) five_sets mpnet-12l 1 ;;
    *)
      echo "run_compare.sh: no part $part; there are seed1, seed2, seed3, large and mpnet" >&2
      exit 2
      ;;
  esac
done
[ -n "${DRY-}" ] || consistentee compare --render --criteria all --output-dir "$out"
