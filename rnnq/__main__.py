"""`python -m rnnq` is `rnnq`."""

from rnnq.cli import main

main()
