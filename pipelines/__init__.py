"""The jobs that an operator starts: crawl, probe, complete, publish, and the demo."""
