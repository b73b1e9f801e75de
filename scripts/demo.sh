#!/usr/bin/env bash
# Sets up the checkout, fetches a small real model, serves it with Lamina, asks it one question, and leaves the server
# up until Ctrl-C. Arguments go to `vllm serve`.
#   PORT   port of the server on the loopback interface (default: 8000)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh
PORT="${PORT:-8000}"
START_DEADLINE=300 # seconds
url="http://127.0.0.1:$PORT"

healthy() {
  python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$url/health" 2>/dev/null
}

if (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then
  echo "demo: something already listens on port $PORT; choose another one: PORT=8001 scripts/demo.sh" >&2
  exit 1
fi

scripts/setup.sh
model="$(python scripts/get_model.py)"

# In bfloat16 this model's first two choices for the question below can tie, and kernels round differently.
echo "demo: vllm serve $model --executor lamina (starts in about a minute)"
vllm serve "$model" --served-model-name SmolLM2 --dtype float32 --executor lamina --lamina-memory 1GiB \
  --max-model-len 4096 --host 127.0.0.1 --port "$PORT" "$@" &
server=$!
SECONDS=0

# vLLM can miss a signal that comes while it starts up, so a second one follows.
stop_server() {
  trap '' INT TERM
  for signal in TERM TERM KILL; do
    kill -s "$signal" "$server" 2>/dev/null || break
    for _ in $(seq 20); do
      kill -0 "$server" 2>/dev/null || return 0
      sleep 1
    done
  done
}
trap stop_server EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

until healthy; do
  if ! kill -0 "$server" 2>/dev/null; then
    echo "demo: the server ended; the reason is above" >&2
    exit 1
  fi
  if [ "$SECONDS" -ge "$START_DEADLINE" ]; then
    echo "demo: the server was not healthy within $START_DEADLINE s" >&2
    exit 1
  fi
  sleep 1
done

question="What is the capital of France?"
answer="$(
  python - "$url/v1" "$question" <<'PYTHON'
import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="unused", timeout=60)
messages = [{"role": "user", "content": sys.argv[2]}]
answer = client.chat.completions.create(model="SmolLM2", messages=messages, temperature=0, max_tokens=64)
print(answer.choices[0].message.content)
PYTHON
)"
cat <<TEXT

  Question: $question
  Answer:   $answer

The server is up on $url until Ctrl-C. Try:

  curl $url/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "SmolLM2", "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 100}'
  curl $url/metrics
TEXT
wait "$server"
