"""Where training data comes from: registered, withdrawn, and what of it each run used (spec/data.md).

    add(home, source="acme", path=Path("data/acme"), licence="CC-BY-4.0", use="training")
    withdraw(home, source="acme", reason="consent withdrawn")
    answer = ask(home, source="acme", run="r2")        # not_used, used, or cannot_tell with its reasons

Content decides, never names: a file is what its SHA-256 says, wherever it lies and whatever it is called.
"""
