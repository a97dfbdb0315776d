"""From families to edges: neighbours, relations that are known at once, the tree, newcomers; other methods beside it."""
