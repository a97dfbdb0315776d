"""What two models say about each other: which came first, how one was made from the other, how sure that is."""
