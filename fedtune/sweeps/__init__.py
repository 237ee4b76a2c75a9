"""Many runs of one command: grids and searches that outlive failures, with what they spend of privacy."""
