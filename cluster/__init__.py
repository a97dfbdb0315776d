"""How ProbeLog's work is spread over Ray: session, scheduler, probing actors, sharded completion."""
