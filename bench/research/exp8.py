"""Does what a page gives back shrink? Keys and values of pages scaled about their mean over the window, at 8x.

    PYTHONPATH=. python bench/research/exp8.py PROFILE MODEL TEXT ...
"""

import sys
from pathlib import Path

import torch

import spectral.oneshot as oneshot
from spectral import SpectralProfile
from spectral.calibrate import token_windows
from spectral.hf import load_model
from spectral.scoring import ExactPass

loaded = load_model(sys.argv[2], dtype="float32")
book = SpectralProfile.load(sys.argv[1]).codebook("8x", device=loaded.device)
real, gains = oneshot._views, [1.0, 1.0]


def views(*arguments):
    kept, restored = real(*arguments)
    out = []
    for exact, coded, gain in zip(kept, restored, gains):
        mean = exact.mean(1, keepdim=True)
        out.append(torch.where(exact == coded, coded, mean + gain * (coded - mean)))  # the exact window stays
    return kept, tuple(out)


oneshot._views = views
for name in sys.argv[3:]:
    window = token_windows(loaded, [Path(name).read_text()], 4096, 4096, 1)[0]
    exact = ExactPass.run(loaded, window)
    for pair in ([1.0, 1.0], [1.0, 1.03], [1.03, 1.0], [1.03, 1.03], [1.01, 1.02], [1.0, 1.05]):
        gains[:] = pair
        row = oneshot.score_oneshot(exact, book)
        print(Path(name).name, pair, f"KL {row['kl'].mean():.5f} nll {row['nll'].mean() - row['exact_nll'].mean():+.5f}")
