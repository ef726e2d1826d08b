#!/usr/bin/env bash
# Requests that schemathesis makes up from the server's own description, well-formed and broken ones: no 500, no hang.
# schemathesis brings a pytest plugin, so it lives in an environment of its own:
#   python3 -m venv FUZZ && FUZZ/bin/pip install schemathesis
#   benchmarks/fuzz_server.sh FUZZ/bin/schemathesis MODEL [EXAMPLES]
set -eu
schemathesis=$1 model=$2 examples=${3:-400}
said=$(mktemp)
"${PYTHON:-python3}" -m consistentee serve "$model" --port 0 --deadline-ms 5000 > "$said" &
server=$!
trap 'kill "$server" 2> /dev/null || true; rm -f "$said"' EXIT
until grep -q '^Serving' "$said"; do
  kill -0 "$server"
  sleep 0.5
done
url=$(awk '/^Serving/ {print $NF}' "$said")
"$schemathesis" run "$url/openapi.json" --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
  --mode all --max-examples "$examples" --request-timeout 20 --seed 1 --no-color
