"""Reading a configuration or a store without changing it."""
