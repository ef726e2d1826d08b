#!/usr/bin/env bash
# Requests that schemathesis makes up from the server's own description, well-formed and broken ones: no 500, no hang,
# nothing that failed inside, and a server that answers afterwards. MODEL is a classifier or a text generator; a small one
# with a short context (a generator's texts are as long as it allows), and EXAMPLES of 100 make 1,000 requests and more.
# schemathesis brings a pytest plugin, so it lives in an environment of its own:
#   python3 -m venv FUZZ && FUZZ/bin/pip install schemathesis
#   benchmarks/fuzz_server.sh FUZZ/bin/schemathesis MODEL [EXAMPLES [all|positive|negative]]
set -eu
schemathesis=$1 model=$2 examples=${3:-400} mode=${4:-all}
said=$(mktemp)
"${PYTHON:-python3}" -m consistentee serve "$model" --port 0 --deadline-ms 5000 > "$said" &
server=$!
trap 'kill "$server" 2> /dev/null || true; rm -f "$said"' EXIT
until grep -q '^Serving' "$said"; do
  kill -0 "$server"
  sleep 0.5
done
url=$(awk '/^Serving/ {print $NF}' "$said")
status=0
"$schemathesis" run "$url/openapi.json" --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
  --mode "$mode" --max-examples "$examples" --request-timeout 20 --seed 1 --no-color || status=$?
counted=$(curl --silent --fail --max-time 20 "$url/metrics")
echo "$counted" | grep -E '^consistentee_(requests_total|failures_total|queue) *'
echo "$counted" | grep -q '^consistentee_failures_total 0.0' || status=1
kill "$server"
wait "$server" || status=1
exit "$status"
