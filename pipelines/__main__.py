"""`python -m pipelines`: the operator's command where only the working directory travels (a Ray job)."""

from pipelines.cli import main

main()
