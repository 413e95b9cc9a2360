"""`python -m deltaw` is the command `deltaw`."""

from deltaw.cli import main

main()
