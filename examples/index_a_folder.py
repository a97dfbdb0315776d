"""Index a folder of model repositories (FOLDER/owner/name/...), without the Hub.

    python examples/index_a_folder.py FOLDER job.toml

Serves the folder over the Hub's protocol on loopback and runs all stages over it. The configuration (see
docs/configuration.md) names the store, the probes, the encoder and the background. Run again it does what is new.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipelines.config.model import load_config
from pipelines.full import run_full
from pipelines.hubserver import running
from pipelines.job.job import Job
from pipelines.job.progress import Report


def main(folder: str, config_file: str) -> None:
    """Index the folder, and say where the index is."""
    config = load_config(Path(config_file))
    with running(Path(folder)) as endpoint:
        os.environ["HF_ENDPOINT"] = endpoint
        run_full(Job.of(config, Report()), refresh=True)
    print(f'search it: probelog search "dog" --index {config.store}')


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
