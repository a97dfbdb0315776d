"""How ProbeLog's work is spread over Ray: session, scheduler, probing actors, sharded completion."""

import os

# Ray notices a driver that `uv run` started and would start every worker through uv, with an environment of its
# own. Read when ray is imported, hence here. A cluster that relies on it sets the variable itself.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
