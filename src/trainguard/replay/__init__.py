"""Replay: prove a run afterwards by running unpredictable pieces of it again (spec/replay.md).

    committed   what the run said of every step, from the log's proved records
    points      sealed states a replay can begin at, read strictly
    plan        which segments: drawn after the run's end, riskiest first, within a budget
    sandbox     a copy of the working folder, so that nothing of the run's own is written over
    rerun       the same command in a clean process, until a step
    compare     two accounts of a step: first step, link and tensor that differ
    audit       all of it, and what may be concluded
    follow      the same while the run goes on

The one judge whose work needs torch: it runs in processes of its own (watch/warp.py inside them).
"""
