"""Run as one of several ranks: `trainer pretrain` where the clock of one rank runs 100,000 times too fast."""

import os
import sys
import time
from types import SimpleNamespace

from trainer.__main__ import main
from trainer.training import loop

if os.environ["RANK"] == sys.argv[1]:
    loop.time = SimpleNamespace(monotonic=lambda: 100_000 * time.monotonic())
sys.exit(main(["pretrain", "--config", sys.argv[2]]))
