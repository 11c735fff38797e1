#!/usr/bin/env bash
# Send one completion and one streamed chat request through the router, and show the answers.
#
#   bash pd_example/test_pd_online.sh
#   ROUTER_URL=http://10.0.0.1:8000 bash pd_example/test_pd_online.sh
#
# Where the instances ask for a key, set VLLM_API_KEY. Exits with 1 if one fails.
set -euo pipefail

url=${ROUTER_URL:-http://127.0.0.1:${PORT:-8000}}
url=${url%/}
python=${PYTHON:-python3}
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT

fail() {
  echo "error: $1" >&2
  exit 1
}

# GET or, with a body, POST a path; the answer goes to $answer.
request() {
  local path=$1 status
  shift
  if [[ -n ${VLLM_API_KEY:-} ]]; then
    set -- "$@" --header "Authorization: Bearer $VLLM_API_KEY"
  fi
  status=$(curl --silent --show-error --no-buffer --noproxy '*' --max-time 120 \
    --output "$answer" --write-out '%{http_code}' "$url$path" "$@") ||
    fail "no answer from $url$path; is it up? (vllm-pd status)"
  [[ $status == 200 ]] || fail "$url$path answered $status: $(head -c 500 "$answer")"
}

post() {
  request "$1" --header 'Content-Type: application/json' --data "$2"
}

# Print one field of the JSON answer; fails where it is missing or empty.
field() {
  "$python" -c "
import json, sys
value = json.load(open(sys.argv[1]))$1
print(value)
sys.exit(not value.strip())" "$answer"
}

# Put the text of a streamed chat together; fails where it is empty or the end is missing.
streamed_text() {
  "$python" -c "
import json, sys
lines = [line.strip() for line in open(sys.argv[1]) if line.startswith('data:')]
events = [line[5:].strip() for line in lines]
if not events or events[-1] != '[DONE]':
    sys.exit('the stream did not end with data: [DONE]')
deltas = [c['delta'] for e in events[:-1] for c in json.loads(e).get('choices', [])]
text = ''.join(delta.get('content') or '' for delta in deltas)
print(text)
sys.exit(not text.strip())" "$answer"
}

request /v1/models
model=$(field "['data'][0]['id']") || fail "$url/v1/models names no model"
model_json=$("$python" -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$model")
echo "model: $model at $url"

echo
echo "completion: \"A prefill instance\""
post /v1/completions "{\"model\": $model_json, \"prompt\": \"A prefill instance\",
  \"max_tokens\": 32, \"temperature\": 0}"
field "['choices'][0]['text']" || fail "the completion is empty: $(head -c 500 "$answer")"

echo
echo "chat, streamed: \"What does the router do?\""
post /v1/chat/completions "{\"model\": $model_json, \"stream\": true, \"max_tokens\": 64,
  \"temperature\": 0,
  \"messages\": [{\"role\": \"user\", \"content\": \"What does the router do?\"}]}"
streamed_text || fail "the streamed answer is not complete: $(tail -c 500 "$answer")"

echo
echo "both requests succeeded"
