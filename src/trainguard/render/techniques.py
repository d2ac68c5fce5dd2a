"""The threat catalogue's ids with a short title each, for people; the ids alone travel in documents.

A to H: start-up and environment, code at run time, arithmetic of training, data and randomness, checkpoints, many
ranks, evidence, people. An id that is not here is shown as it is: a newer trainguard may have written it.
"""

from __future__ import annotations

GROUPS: dict[str, str] = {
    "A": "start-up and environment",
    "B": "code at run time",
    "C": "optimizer, gradient, loss",
    "D": "randomness and data",
    "E": "checkpoints and weights",
    "F": "many ranks, timing, kills",
    "G": "evidence and the guard itself",
    "H": "people and access",
}

TITLES: dict[str, str] = {
    "A1": "start-up module planted on the path",
    "A2": "code in a .pth or .start file",
    "A3": "native library preloaded or replaced",
    "A4": "environment variable that loads code",
    "A5": "installed package edited in place",
    "A6": "bytecode edited, source untouched",
    "A7": "module hidden by one of the same name",
    "A8": "compiler or download cache poisoned",
    "A9": "plug-in that loads itself",
    "A10": "numeric or safety flag changed",
    "A11": "performance flag or host throttled",
    "A12": "launch chain altered",
    "A13": "dependency replaced, or swapped during the run",
    "B1": "training code is not the approved one",
    "B2": "reviewed hook steered by a side file",
    "B3": "function replaced in memory",
    "B4": "function altered in memory, identity kept",
    "B5": "hook on gradients, modules or optimizers",
    "B6": "operator overridden in the dispatcher",
    "B7": "code run later by a thread, timer or signal",
    "B8": "code injected into the running process",
    "B9": "fault inside reviewed code",
    "C1": "gradient direction changed",
    "C2": "gradient clipping tampered with",
    "C3": "learning rate or schedule changed",
    "C4": "optimizer arithmetic changed",
    "C5": "parameters left out of training",
    "C6": "loss altered",
    "C7": "accumulation or averaging altered",
    "C8": "precision or loss scaling altered",
    "C9": "updates skipped or noise added",
    "C10": "evaluation altered",
    "C11": "architecture, initial weights or mode altered",
    "D1": "random seed or generator tampered with",
    "D2": "batches reordered, repeated or dropped",
    "D3": "data wrongly shared among ranks",
    "D4": "samples or labels changed by a loader",
    "D5": "stored data changed",
    "D6": "tokenizer or vocabulary changed",
    "D7": "mixture of data sources changed",
    "D8": "held-out data mixed with training data",
    "E1": "code in a checkpoint",
    "E2": "code in a file beside a checkpoint",
    "E3": "stored weights edited",
    "E4": "weights changed in memory between steps",
    "E5": "optimizer or generator state of a checkpoint edited",
    "E6": "older checkpoint put back as the latest",
    "E7": "checkpoint parts of other runs or steps mixed in",
    "E8": "checkpoints deleted or let expire",
    "E9": "saving wrote other weights than memory held",
    "E10": "altered checkpoint given a valid seal",
    "F1": "one rank runs something else",
    "F2": "one rank sends a wrong gradient",
    "F3": "collective operation tampered with",
    "F4": "fires only in large jobs",
    "F5": "fires only when conditions fit, or unwatched",
    "F6": "every rank wrong in the same way",
    "F7": "short sleeps slow the job",
    "F8": "processes killed at random",
    "F9": "host, network or scheduler put under pressure",
    "F10": "restart under other conditions",
    "G1": "evidence edited or deleted",
    "G2": "evidence cut off or rolled back",
    "G3": "different histories shown to different readers",
    "G4": "evidence suppressed where it arises",
    "G5": "clock tampered with",
    "G6": "guard, policy or reference values changed",
    "G7": "guard stopped or its report forged",
    "G8": "verifier poisoned",
    "G9": "acts placed under another account",
    "G10": "key stolen, records dated back",
    "G11": "evidence made up to pass the audit",
    "H1": "investigation notes read by the one investigated",
    "H2": "diagnosis steered from inside",
    "H3": "kept below thresholds, paused when watched",
    "H4": "exemption from the guard obtained",
    "H5": "review bypassed",
    "H6": "more rights than the work needs",
    "H7": "administrator acts, or several collude",
    "H8": "automated agent acts, or is used as a tool",
}


def title(technique: str) -> str | None:
    """The short title of a catalogue id, None for one that is not in this table."""
    return TITLES.get(technique)


def labelled(technique: str) -> str:
    """`C4 optimizer arithmetic changed`, or the id alone."""
    known = title(technique)
    return f"{technique} {known}" if known else technique
