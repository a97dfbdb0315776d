"""What is used of Ray without being public: here alone, checked with the version below.

A new version that lacks any of it fails the test of this module, with the name of what is missing.
"""

from __future__ import annotations

import ray

#: The version that these were last checked with.
CHECKED = "2.60.0"


def draining_nodes() -> dict[str, int]:
    """Nodes that are about to be taken away, with their deadlines in milliseconds since 1970 (0: none is known).

    What Ray's own libraries (Train, Serve) ask.

    Raises:
        NotImplementedError: this version of Ray does not say.
    """
    try:
        from ray._private.state import state

        ask = state.get_draining_nodes
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"Ray {ray.__version__}: {error}") from error
    return ask()
