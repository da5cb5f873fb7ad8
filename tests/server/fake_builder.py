"""Stands for `spectral profile build`. The seed says how it goes: 0 copies the profile at $FAKE_PROFILE to the output,
1 runs until it is ended, 2 fails, 3 writes a file that is no profile.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

arguments = sys.argv[1:]
value = {name: arguments[arguments.index(name) + 1] for name in ("--seed", "--output", "--tokens", "--progress")}
print('{"stage": "measuring", "fraction": 0.25}', file=sys.stderr, flush=True)
if value["--seed"] == "1":
    Path(value["--output"] + ".pid").write_text(str(os.getpid()))
    signal.pause()
if value["--seed"] == "2":
    print("error: the model cannot be calibrated", file=sys.stderr, flush=True)
    sys.exit(2)
if value["--seed"] == "3":
    Path(value["--output"]).write_bytes(b"nothing")
else:
    shutil.copy(os.environ["FAKE_PROFILE"], value["--output"])
print('{"stage": "measuring", "fraction": 1.0}', file=sys.stderr, flush=True)
