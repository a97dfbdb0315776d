"""The nightly run: what the Hub added and removed since the last one."""
