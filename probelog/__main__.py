"""The `probelog` command, `python -m probelog`: an interrupt is one line from the start, while libraries are imported, to the end."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line."""
    try:
        from probelog.cli import main

        main()
    except KeyboardInterrupt:
        sys.stderr.write("probelog: interrupted\n")
        raise SystemExit(130) from None
    finally:
        # The answer is out, and what ends now has nobody to catch an interrupt: the system's own way is silent.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
