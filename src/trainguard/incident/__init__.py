"""The answer: what is tainted, what is provably clean, how to go on. Pure functions of the log and the verdicts."""
