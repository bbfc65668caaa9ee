"""`python -m cotvalve` is the `cotvalve` command."""

from cotvalve.cli import main

# Processes that vLLM spawns import this module again, under another name.
if __name__ == "__main__":
    main()
