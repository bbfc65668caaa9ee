"""`python -m cotvalve` is the `cotvalve` command."""

from cotvalve.cli import main

main()
