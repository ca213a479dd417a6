"""Help the tests: what more than one file of them uses."""
