"""`probelog-index`: the operator's command line."""


def main() -> None:
    """Run the command line."""
