#!/usr/bin/env bash
# Everything that curl alone can do: SPECTRAL_URL names another server than http://127.0.0.1:8000.
set -euo pipefail
URL=${SPECTRAL_URL:-http://127.0.0.1:8000}
MODEL=${SPECTRAL_MODEL:-demo-7m}
post() { curl --fail-with-body --silent --show-error --no-buffer -H 'Content-Type: application/json' "$URL$1" -d "$2"; echo; }

echo "== models"
curl --fail --silent "$URL/v1/models"; echo
echo "== a chat"
post /v1/chat/completions '{"model": "'"$MODEL"'", "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'
echo "== the same, streamed"
post /v1/chat/completions '{"model": "'"$MODEL"'", "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "stream": true}'
echo "== as Ollama's clients ask"
post /api/generate '{"model": "'"$MODEL"'", "prompt": "What is the capital of France?", "stream": false, "options": {"temperature": 0}}'
echo "== tokens"
post /tokenize '{"model": "'"$MODEL"'", "prompt": "What is the capital of France?"}'
echo "== who holds which memory (from this machine, or with the admin key)"
curl --fail --silent "$URL/admin/vram"; echo
