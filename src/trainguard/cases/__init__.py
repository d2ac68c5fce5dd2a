"""Cases: rooms for those who look for a cause, closed to everyone the evidence names (spec/case.md, docs/cases.md).

    desk = Desk(home, load_identity(path))
    code, act = desk.open(incidents, subjects, with_card=second, reason="…", until=…)
    desk.sign(code, act)                        # by the second person, at their own desk
    view = desk.show(code)                      # logged first, then shown

A room is a chain of signed records. Each is encrypted to those who are members when it is written, and stands in the
transparency log as an opaque entry of the one size that every call of every `case` verb writes, whoever calls it and
whatever it finds. So a list, a count, an error or the log tells a stranger nothing that depends on there being a case.
"""
