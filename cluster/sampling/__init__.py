"""Sampling of generators on Ray: the actor, and the bases that adapters are run with."""
