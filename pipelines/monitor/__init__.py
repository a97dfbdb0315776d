"""What operators watch: the state of a store as metrics."""
