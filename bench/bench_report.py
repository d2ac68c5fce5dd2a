"""A technical report of 800 findings as a page and as PDF/A (goals: page ≤ 1 s, PDF ≤ 30 s), and that its bytes repeat.

python bench/bench_report.py
"""

from __future__ import annotations

import time

from trainguard.finding import Citation, Finding, Subject
from trainguard.incident.attribute import Facts, attribute
from trainguard.incident.correlate import Incident
from trainguard.incident.lineage import Family, Line
from trainguard.render.documents import pdf_of
from trainguard.render.incident import incident_page

FINDINGS, MODELS = 800, 200


def incident() -> tuple[Incident, Family]:
    """Weights edited in 800 steps, and 200 models made from them."""
    found = tuple(
        Finding(
            check="weights",
            outcome="violated",
            techniques=("E4", "B7"),
            subject=Subject(run="r1", rank=step % 8, step=step, tensor=f"transformer.h.{step % 48}.attn.c_proj.weight"),
            message=f"before step {step}: 4 of 64 sampled elements changed (multiplied by 1.01), between two steps",
            expected="what the step before left",
            found=f"{step:016x}",
            evidence=(Citation(leaf=step, hash=f"{step:064x}"),),
        )
        for step in range(1, FINDINGS + 1)
    )
    labels = tuple(f"model-{index}.pt (run r{index}, step 1000)" for index in range(MODELS))
    lines = tuple(Line(key=label, kind="checkpoint", label=label, word="TAINTED") for label in labels)
    told = Incident(
        id="inc-0123456789",
        run="r1",
        kind="E",
        severity="critical",
        first_step=1,
        last_step=FINDINGS,
        ranks=tuple(range(8)),
        findings=found,
        techniques=("E4", "B7"),
        attribution=attribute(found, Facts(host="node-3", uid=1001)),
        affected=labels,
    )
    return told, Family(affected=lines, cleared=lines)


def main() -> None:
    told, family = incident()
    incident_page(told, family)
    began = time.process_time()
    page = incident_page(told, family)
    drawn = time.process_time()
    print(f"page  {drawn - began:6.2f} CPU-s  {len(page.encode()):,} bytes")
    data = pdf_of(page, identity=told.id)
    made = time.process_time()
    print(f"PDF/A {made - drawn:6.2f} CPU-s  {len(data):,} bytes, WeasyPrint's import included")
    same = pdf_of(page, identity=told.id) == data
    print(f"again {time.process_time() - made:6.2f} CPU-s  {'the same bytes' if same else 'OTHER BYTES'}")


if __name__ == "__main__":
    main()
