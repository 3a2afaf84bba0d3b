"""What a run has to say to whoever watches it: `notices.txt`, and the terminal of the driver, which follows that file.

Ray keeps what workers print in files of its own.
"""

import datetime
from pathlib import Path

NOTICES = "notices.txt"


def say(run_dir: Path, text: str) -> None:
    """Print a line and add it to the run's notices. Safe from any worker and thread."""
    print(text, flush=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with open(run_dir / NOTICES, "a") as file:  # one short write in append mode: lines of several workers do not mix
        file.write(f"{now} {text}\n")
