"""`python -m loratools` is the command line."""

from loratools.cli import main

main()
