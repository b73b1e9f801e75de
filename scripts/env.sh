# Environment shared by the scripts here; source it from the root of the checkout.

# The virtual environment: LAMINA_VENV, else the active one, else .venv in the checkout.
LAMINA_VENV="${LAMINA_VENV:-${VIRTUAL_ENV:-$PWD/.venv}}"
export LAMINA_VENV
export PATH="$LAMINA_VENV/bin:$PATH"

# Nothing is fetched from a model hub and nothing is reported to anyone.
export HF_HUB_OFFLINE=1
export VLLM_NO_USAGE_STATS=1
export DO_NOT_TRACK=1

# Python keeps what it compiles: scripts/setup.sh leaves it to the first import, and a process starts at half the cost.
export PYTHONDONTWRITEBYTECODE=
