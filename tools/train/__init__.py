"""Networks of the zoo, trained and pruned on photographs: `python -m tools.train --help`."""
