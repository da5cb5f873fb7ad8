"""`python -m spectral`, the same as the command `spectral`."""

from spectral.cli import main

main()
