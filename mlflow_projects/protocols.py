"""One recipe under each protocol card. See `trainer.experiment.protocols`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without being installed

from etl import stopping

if __name__ == "__main__":
    stopping.begin()

from trainer.experiment.protocols import main

if __name__ == "__main__":
    stopping.leave(main())
