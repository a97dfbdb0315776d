"""The Ray session, its nodes, and what is prepared on them."""
