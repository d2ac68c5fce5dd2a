"""Which process is which rank, in which attempt: learnt from the records of the processes themselves.

A job that is started again (torchrun --max-restarts) has new processes for the same ranks; what they report must
never be compared with what the processes before them reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trainguard.evidence import Evidence

NUMBER_LIMIT = 1 << 20
HOOKS_LIMIT = 64
TORCH_HOOKS = "torch.distributed.algorithms.ddp_comm_hooks."
TORCH_PLACE = "/torch/distributed/algorithms/ddp_comm_hooks/"


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a job, as it says of itself."""

    process: int | None
    pid: int | None
    rank: int | None
    attempt: int
    """How often the launcher had started the job again before."""
    run: str | None
    """The launcher's name of the job (TORCHELASTIC_RUN_ID)."""
    local_world: int | None
    """Ranks that the launcher started on this host."""
    group: int | None
    """Number of the launcher among all (GROUP_RANK): one a host, as a rule."""
    ppid: int | None = None
    """Parent, as the kernel says."""


@dataclass(slots=True)
class Ranks:
    """Members by process number; feed it every record."""

    members: dict[int | None, Member] = field(default_factory=dict)
    claimed: dict[int | None, int] = field(default_factory=dict)
    """Process → rank that torch.distributed told it, where the environment names none."""
    jobs: dict[int | None, str] = field(default_factory=dict)
    """Process → the job it is a rank of: two may run at once under one guard."""
    acting: dict[tuple[str, int, int], list[int | None]] = field(default_factory=dict)
    """Job, launcher's count of restarts, rank → processes that made steps as it, in order."""
    turns: dict[int | None, int] = field(default_factory=dict)
    """Process → how many made steps as the same rank before it."""
    numbers: dict[tuple[str, int, int], int] = field(default_factory=dict)
    """Job, restarts, turn → number of the attempt."""
    ended: set[int | None] = field(default_factory=set)
    hooks: dict[str, str] = field(default_factory=dict)
    """Communication hooks that ranks said they use → where their code is."""

    def see(self, evidence: Evidence) -> None:
        """Learn from a `process` record, or from what a rank says of itself in its steps."""
        if evidence.kind == "process":
            self.members[evidence.process] = member_of(evidence)
        elif evidence.kind == "step":
            value = evidence.body.get("replicas")
            rank = value.get("rank") if isinstance(value, dict) else None
            for row in value.get("hooks") or () if isinstance(value, dict) else ():
                if isinstance(row, list) and len(row) == 2 and len(self.hooks) < HOOKS_LIMIT:
                    self.hooks[str(row[0])[:200]] = str(row[1])[:1024]
            if isinstance(rank, int) and 0 <= rank < NUMBER_LIMIT and evidence.process not in self.claimed:
                self.claimed[evidence.process] = rank
                self.jobs[evidence.process] = str(value.get("job", ""))[:16] if isinstance(value, dict) else ""
                acting = self.acting.setdefault(self._place(evidence), [])
                self.turns[evidence.process] = len(acting)
                acting.append(evidence.process)
        elif evidence.kind == "exit":
            self.ended.add(evidence.process)

    def attempt(self, evidence: Evidence) -> int:
        """A number that the processes of one attempt share, and no others.

        A launcher that starts its ranks again because the job grew or shrank does not count that as a restart, so the
        processes that acted as a rank one after the other count as well.
        """
        job, restarts, _ = self._place(evidence)
        key = (job, restarts, self.turns.get(evidence.process, 0))
        if len(self.numbers) >= NUMBER_LIMIT:
            return self.numbers.get(key, 0)
        return self.numbers.setdefault(key, len(self.numbers))

    def restarts(self, evidence: Evidence) -> tuple[int | None, int]:
        """The launcher of the process of this record (its parent), and how often that had started its ranks again."""
        member = self.members.get(evidence.process)
        return (member.ppid, member.attempt) if member is not None else (None, 0)

    def beginners(self, evidence: Evidence) -> set[int]:
        """Ranks whose processes were started as often as the process of this record, as they said."""
        restarts = self.restarts(evidence)[1]
        return {m.rank for m in self.members.values() if m.rank is not None and m.attempt == restarts}

    def torch_hook(self, *names: str) -> bool:
        """Whether ranks use one of these communication hooks of torch itself (by its module's last part)."""
        return any(
            name.startswith(TORCH_HOOKS) and name[len(TORCH_HOOKS) :].split(".")[0] in names and TORCH_PLACE in place
            for name, place in self.hooks.items()
        )

    def beside(self, evidence: Evidence) -> int | None:
        """A process that acts as the same rank and has not ended; None when there is none."""
        others = self.acting.get(self._place(evidence), [])
        turn = self.turns.get(evidence.process, 0)
        return next((each for each in others[:turn] if each not in self.ended), None)

    def _place(self, evidence: Evidence) -> tuple[str, int, int]:
        """Job, restarts and rank of a process; rank -1 before it has told one."""
        job = self.jobs.get(evidence.process, "")
        return job, self.restarts(evidence)[1], self.claimed.get(evidence.process, -1)

    def rank(self, evidence: Evidence) -> int | None:
        """Rank of the process of this record; None where nothing told it."""
        return self.claimed.get(evidence.process, evidence.rank)


def member_of(evidence: Evidence) -> Member:
    """What a `process` record says of rank and attempt. Claims but for pid and parent."""
    hello = evidence.body.get("hello")
    env = hello.get("env") if isinstance(hello, dict) else None
    env = env if isinstance(env, dict) else {}
    run = env.get("TORCHELASTIC_RUN_ID")
    ppid = evidence.body.get("ppid")
    return Member(
        process=evidence.process,
        pid=evidence.pid,
        rank=evidence.rank,
        attempt=_number(env.get("TORCHELASTIC_RESTART_COUNT")) or 0,
        run=run[:200] if isinstance(run, str) else None,
        local_world=_number(env.get("LOCAL_WORLD_SIZE")),
        group=_number(env.get("GROUP_RANK")),
        ppid=ppid if isinstance(ppid, int) else None,
    )


def _number(text: object) -> int | None:
    if not isinstance(text, str) or not text.isdigit() or len(text) > 7:
        return None
    return min(int(text), NUMBER_LIMIT)
