#!/usr/bin/env bash
# Sets up, then federates LoRA over ~150 standard-library clients, starting from
# the byte language model that fedfm ships. Writes runs/quickstart/.
set -euo pipefail
source "$(dirname "$0")/environment.sh" ""
# One virtual device a core: a lane of clients on each.
cores=$(python -c 'import os; print(min(len(os.sched_getaffinity(0)), 8))')
export XLA_FLAGS="${XLA_FLAGS:---xla_force_host_platform_device_count=$cores}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec python scripts/quickstart.py "$@"
