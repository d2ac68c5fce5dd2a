"""A second set of scripted incidents: what computing centres see, told by another hand than the first.

    for script in CASEBOOK:
        score(play(script, folder, seed=1))

`incidents.py` tells what a saboteur does; these tell what the evidence of it looks like in a house where people share
accounts, become root, leave cron jobs behind, mount NFS, restore backups, commit through robots, delete accounts and
clean up after themselves. The truth of each says what an honest investigator could say **from the record**: an account
where the record shows one, and nobody where two stories fit it equally well, also if the script knows better.

What each expects was fixed before attribution was run on it, and by these rules:

- An audit login outranks the account a process runs under: sudo and su do not change it.
- Root without a login says nothing: deployments, restores and daemons are root. So does `nobody`, which is what NFS
  makes of root.
- A service account without a login is an account, and no person.
- The owner of a file counts as it was when the act was recorded. Who owns it later counts only if the inode was not
  changed since, and never if others could write it or put another one in its place.
- The owner of a file that is as it was committed pulled the commit, which says nothing of who wrote the line. (Added
  later than the rest: it took the account from two scripts, this one's robot and the other set's forged author.)
- What git shows as the author is a claim; so is what the scheduler's variables say, and any name inside the evidence.
- The job's own account is not the suspect because its own files or its own shell did something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from trainguard.finding import Finding, Subject
from trainguard.incident.traces import Authorship, Inode
from trainguard.policy import Approval
from trainguard.testing.incidents import (
    AGENT,
    COLLEAGUE,
    INSIDER,
    NO_LOGIN,
    ROOT,
    SECOND,
    SERVICE,
    SITE,
    STEPS,
    VICTIM_A,
    VICTIM_B,
    Group,
    Job,
    Script,
    Stage,
    Truth,
    pid_of,
)

Body = dict[str, Any]

NFS_NOBODY, LEAVER, MAPPED = 65534, 2077, 101003
"""What NFS makes of root; an account that no longer exists; the insider's number in a user namespace."""
OLD, NEW = "a" * 64, "c" * 64
EVERYBODY = frozenset({VICTIM_A, VICTIM_B, INSIDER, SERVICE, COLLEAGUE, ROOT, NFS_NOBODY})
TOOL = "/shared/tools/probe.py"
DAY = 86400 * SECOND


def _shows(account: int | None, *, word: str = "TAINTED", loss: Any = None, but: Sequence[int] = ()) -> Truth:
    """The record shows `account`, and so nobody else may stand first; `but` may."""
    return Truth(account=account, framed=EVERYBODY - {account, *but}, loss=loss, word=word)


# -- what is recorded ----------------------------------------------------------------------------------------------


def _config_changed(stage: Stage, *, read_as: int, now: Inode | None, step: int | None = None, **line: Any) -> None:
    """A file that the job reads has other content; the kernel said at that moment who owned it."""
    path = "/job/hook.json"
    _lies(stage, path, now)
    _lies(stage, "/job/train.py", _file(VICTIM_A))

    def act(job: Job) -> None:
        job.bad()
        told = {"path": path, "sha256": NEW, "was": OLD, "mode": "r", "changed": True, "size": 31, "opens": 5}
        told |= {"step": job.number, "place": "/job/train.py:14", "uid": read_as}
        told |= {"mtime_ns": job.stage.now, "ctime_ns": job.stage.now} | line
        job.says("open", {"files": [told]})

    stage.at[stage.step() if step is None else step] = act


def _strange_thread(stage: Stage, now: Inode | None, *, path: str = TOOL, name: str = "t") -> None:
    """A thread whose code lies outside the job. The record of it has no owner: that is read from the disk, later."""
    _lies(stage, path, now)

    def act(job: Job) -> None:
        job.bad()
        seen = {"kind": "thread", "origin": f"{path}:77", "function": "loop", "on": "", "name": name, "count": 1}
        job.says("sweep", {"what": "deferred", "checked": 5, "found": [seen], "threads": 3, "atexit": 1})

    stage.at[stage.step()] = act


def _ran(stage: Stage, owner: Sequence[int], now: Inode | None, *, path: str = TOOL) -> None:
    """Code of a file was executed; the record has the file's owner and folder at that moment."""
    _lies(stage, path, now)
    _lies(stage, "/job/train.py", _file(VICTIM_A))

    def act(job: Job) -> None:
        job.bad()
        ran = {"file": path, "sha256": NEW, "same": True, "source": NEW, "code": NEW, "place": "/job/train.py:14"}
        job.says("code", {"ran": ran | {"function": "main", "times": 1, "owner": list(owner)}})

    stage.at[stage.step()] = act


def _module(stage: Stage, path: str, module: str, now: Inode | None) -> None:
    """An imported file is not what was approved."""
    _lies(stage, path, now)

    def act(job: Job) -> None:
        job.bad()
        job.says("code", {"files": [[path, NEW, module, "source"]]})

    stage.before = act


def _model_file(stage: Stage, owner: Sequence[int], technique: str, why: str) -> None:
    """The supervisor found a model file that the job opened to be another than was sealed."""
    path = "/shared/ckpt/base.pt"
    _lies(stage, path, Inode(uid=owner[0], mode=owner[1], folder_uid=owner[2], folder_mode=owner[3]))

    def act(job: Job) -> None:
        found = Finding(
            check="seal",
            outcome="violated",
            techniques=(technique,),
            subject=Subject(run="attacked", path="base.pt"),
            message=why,
        )
        body: Body = {"path": path, "owner": list(owner), "findings": [msgspec.to_builtins(found)]}
        body |= {"verdict": "clean", "format": "zip", "sha256": NEW, "place": "/job/train.py:9", "why": why}
        job.bad()
        job.add("opened", body | {"refused": False}, **job.where(0))

    stage.before = act


def _killed(stage: Stage, *, step: int | None = None, meant: bool = True, **sender: Any) -> None:
    """The node's ledger saw a process outside the job end a rank. `meant`: the time counts as lost to an act."""
    stage.node = True
    known = {"pid": 4321, "uid": ROOT, "comm": "python3", "exe": "/usr/bin/python3", "start_ticks": 81234}
    known |= {"cmdline": ["python3", "tidy.py"], "loginuid": NO_LOGIN, "session": NO_LOGIN, "ancestry": []}
    known |= {"euid": sender.get("uid", ROOT)} | sender

    def act(job: Job) -> None:
        job.stage.now += 10 * SECOND
        body = {"signal": 9, "target": pid_of(job.base + 1), "target_comm": "python", "target_uid": stage.uid}
        job.add("outside", body | {"kernel": False, "sender": known, "at": job.stage.now})
        _ends(job, meant=meant)

    stage.at[stage.step() if step is None else step] = act


def _ends(job: Job, *, meant: bool, **how: Any) -> None:
    before = job.stage.lost_ns
    job.die(**how)
    if not meant:
        job.stage.lost_ns = before
        job.saved_at = job.stage.now  # what was done again for this reason is no part of the next loss


def _shell(*words: str) -> list[list[Any]]:
    """Ancestry, nearest first: programs by name."""
    return [[4000 - 10 * number, 900 - number, word, [word]] for number, word in enumerate(words)]


def _file(uid: int, mode: int = 0o644, folder: tuple[int, int] = (ROOT, 0o755), changed: int | None = None) -> Inode:
    return Inode(uid=uid, mode=mode, changed_ns=changed, folder_uid=folder[0], folder_mode=folder[1])


def _lies(stage: Stage, path: str, now: Inode | None) -> None:
    """What the disk says when somebody asks, which is after the act; without a time of its own, long before it."""
    if now is not None:
        changed = stage.now - DAY if now.changed_ns is None else now.changed_ns
        stage.inodes[path] = msgspec.structs.replace(now, changed_ns=changed)


def _later(stage: Stage) -> int:
    """A moment after the run, and before anybody asks."""
    return stage.now + DAY


# -- the scripts ---------------------------------------------------------------------------------------------------


def _scene(name: str, group: Group, truth: Truth, tell: Callable[[Stage], object], **stage: Any) -> Script:
    def act(on: Stage) -> Truth:
        for key, value in stage.items():
            setattr(on, key, value)
        tell(on)
        return truth

    return Script(name=name, group=group, act=act)


def _shared_accounts() -> list[Script]:
    late: Any = {"word": "SUSPECT", "loss": "time"}
    sudo: Any = {"ancestry": _shell("sudo", "bash", "sshd"), "session": 7}
    return [
        _scene(
            "service account through sudo",
            "frame",
            _shows(INSIDER, **late),
            lambda s: _killed(s, uid=SERVICE, loginuid=INSIDER, **sudo),
        ),
        _scene("service account, no login", "act", _shows(SERVICE, **late), lambda s: _killed(s, uid=SERVICE)),
        _scene(
            "root through sudo, session not known",
            "frame",
            _shows(INSIDER, **late),
            lambda s: _killed(s, uid=ROOT, loginuid=INSIDER, session=None, ancestry=_shell("sudo", "bash")),
        ),
        _scene(
            "set-uid helper",
            "act",
            _shows(INSIDER, **late),
            lambda s: _killed(s, uid=INSIDER, euid=ROOT, loginuid=INSIDER, session=7),
        ),
        _scene(
            "number of a user namespace",
            "act",
            _shows(INSIDER, **late),
            lambda s: _killed(s, uid=MAPPED, loginuid=INSIDER, session=7, ancestry=_shell("bash", "podman")),
        ),
        _scene(
            "root of a container",
            "act",
            _shows(None, **late),
            lambda s: _killed(s, exe="/usr/bin/kill", ancestry=_shell("sh", "containerd-shim")),
        ),
        _scene(
            "cron job of the insider",
            "act",
            _shows(INSIDER, **late),
            lambda s: _killed(s, uid=INSIDER, loginuid=INSIDER, session=512, ancestry=_shell("sh", "cron")),
        ),
        _scene(
            "cron job of a deleted account",
            "act",
            _shows(LEAVER, **late),
            lambda s: _killed(s, uid=LEAVER, ancestry=_shell("sh", "cron")),
        ),
        _scene(
            "user timer of the insider",
            "act",
            _shows(INSIDER, **late),
            lambda s: _killed(s, uid=INSIDER, ancestry=_shell("systemd", "systemd")),
        ),
        _scene("victim logged in at the same moment", "frame", _shows(INSIDER, **late), _both_logged_in),
        _scene(
            "stolen credentials, which the record cannot tell",
            "act",
            _shows(VICTIM_B, **late),
            lambda s: _killed(s, uid=VICTIM_B, loginuid=VICTIM_B, session=9, ancestry=_shell("bash", "sshd")),
        ),
        _scene("victim's cron runs the insider's file", "frame", _shows(INSIDER, **late), _trap_in_crontab),
        _scene("process number used again", "frame", _shows(None, **late), _number_used_again),
    ]


def _both_logged_in(stage: Stage) -> None:
    _killed(stage, uid=VICTIM_B, loginuid=INSIDER, session=7, ancestry=_shell("su", "bash", "sshd"))

    def present(job: Job) -> None:
        body = {"hello": {"version": "3.11.7", "env": {}}, "ppid": AGENT, "of_the_job": True, "loginuid": VICTIM_B}
        job.add("process", body | {"session": 4, "start_ticks": 5}, process=70, pid=970, uid=VICTIM_B)

    stage.before = present


def _trap_in_crontab(stage: Stage) -> None:
    """Her crontab has run a shared tool for a year; he rewrote the tool."""
    path = "/shared/bin/tidy.py"
    _lies(stage, path, _file(INSIDER))
    _killed(
        stage, uid=VICTIM_B, loginuid=VICTIM_B, session=611, cmdline=["python3", path], ancestry=_shell("sh", "cron")
    )


def _number_used_again(stage: Stage) -> None:
    """The sender had ended before it was looked at; a minute later its number is somebody else's."""
    stage.node = True

    def act(job: Job) -> None:
        job.stage.now += 10 * SECOND
        body = {"signal": 9, "target": pid_of(job.base + 1), "target_comm": "python", "target_uid": stage.uid}
        gone = {"pid": 4321, "comm": "kill", "uid": None}
        job.add("outside", body | {"kernel": False, "sender": gone, "at": job.stage.now})
        job.die()
        told = {"hello": {"version": "3.11.7", "env": {}}, "ppid": AGENT, "of_the_job": True, "loginuid": VICTIM_B}
        job.add("process", told | {"session": 4, "start_ticks": 99999}, process=71, pid=4321, uid=VICTIM_B)

    stage.at[stage.step()] = act


def _files() -> list[Script]:
    lost: Any = {"loss": "results"}
    rename = (ROOT, 0o777)
    theirs = [INSIDER, 0o644, ROOT, 0o755]
    return [
        _scene(
            "copied with the times kept",
            "act",
            _shows(INSIDER, **lost),
            lambda s: _config_changed(s, read_as=INSIDER, now=_file(INSIDER), mtime_ns=s.now - 300 * DAY),
        ),
        _scene(
            "file server eight hours ahead",
            "act",
            _shows(INSIDER, **lost),
            lambda s: _config_changed(
                s, read_as=INSIDER, now=_file(INSIDER), mtime_ns=s.now + DAY // 3, ctime_ns=s.now + DAY // 3
            ),
        ),
        _scene(
            "victim's own old file moved back by others",
            "frame",
            _shows(None, **lost),
            lambda s: _config_changed(
                s, read_as=VICTIM_B, now=_file(VICTIM_B, folder=rename), mtime_ns=s.now - 40 * DAY
            ),
        ),
        _scene(
            "owner is nobody, by NFS",
            "act",
            _shows(None, **lost),
            lambda s: _config_changed(s, read_as=NFS_NOBODY, now=_file(NFS_NOBODY)),
        ),
        _scene(
            "owner is a deleted account",
            "act",
            _shows(LEAVER, **lost),
            lambda s: _config_changed(s, read_as=LEAVER, now=_file(LEAVER)),
        ),
        _scene(
            "colleague edited the file afterwards, owner recorded",
            "frame",
            _shows(INSIDER, **lost),
            lambda s: _config_changed(s, read_as=INSIDER, now=_file(COLLEAGUE, changed=_later(s))),
        ),
        _scene(
            "colleague edited the file afterwards, owner not recorded",
            "frame",
            _shows(None, **lost),
            lambda s: _strange_thread(s, _file(COLLEAGUE, changed=_later(s))),
        ),
        _scene(
            "insider tidied up, owner recorded",
            "frame",
            _shows(INSIDER, **lost),
            lambda s: _ran(s, theirs, _file(VICTIM_A, changed=_later(s))),
        ),
        _scene("file gone, owner recorded", "act", _shows(INSIDER, **lost), lambda s: _ran(s, theirs, None)),
        _scene("file gone, owner not recorded", "act", _shows(None, **lost), lambda s: _strange_thread(s, None)),
        _scene(
            "two with the same access",
            "frame",
            _shows(None, **lost),
            lambda s: _strange_thread(s, _file(ROOT, 0o664, (ROOT, 0o775))),
        ),
        _scene(
            "insider's file that all may write",
            "frame",
            _shows(None, **lost),
            lambda s: _strange_thread(s, _file(INSIDER, 0o666, (ROOT, 0o777))),
        ),
        _scene(
            "file in a sticky folder",
            "act",
            _shows(INSIDER, **lost),
            lambda s: _strange_thread(s, _file(INSIDER, folder=(ROOT, 0o1777)), path="/tmp/.x/probe.py"),  # noqa: S108
        ),
        _scene(
            "victim's file in the insider's folder",
            "frame",
            _shows(None, **lost, but=(INSIDER,)),
            lambda s: _strange_thread(s, _file(VICTIM_B, folder=(INSIDER, 0o755)), path="/home/insider/lib/probe.py"),
        ),
        _scene(
            "everything is called victim-b",
            "frame",
            _shows(INSIDER, **lost),
            lambda s: _strange_thread(
                s, _file(INSIDER), path="/shared/victim-b/victim_b_debug.py", name="victim-b thread"
            ),
        ),
        _scene("deployed by the service account", "act", _shows(None, **lost), _robot),
        _scene("deployed by root, author forged", "frame", _shows(None, **lost), _deployed),
        _scene("unsigned commit in the victim's open file", "frame", _shows(None, **lost), _forged_and_open),
        _scene(
            "checkpoint edited through NFS",
            "act",
            _shows(None, **lost),
            lambda s: _model_file(
                s, [NFS_NOBODY, 0o644, NFS_NOBODY, 0o755], "E3", "head.weight is not what was sealed"
            ),
        ),
        _scene(
            "checkpoint edited by the service account",
            "act",
            _shows(SERVICE, **lost),
            lambda s: _model_file(s, [SERVICE, 0o644, SERVICE, 0o755], "E5", "exp_avg is not what was sealed"),
        ),
        _scene(
            "act in the last step",
            "act",
            _shows(INSIDER, **lost),
            lambda s: _config_changed(s, read_as=INSIDER, now=_file(INSIDER), step=STEPS),
        ),
        _scene(
            "act in the second step",
            "act",
            _shows(INSIDER, **lost),
            lambda s: _config_changed(s, read_as=INSIDER, now=_file(INSIDER), step=2),
        ),
        _scene("planted beside an approved change", "act", _shows(INSIDER, **lost), _beside_approved),
    ]


def _claims(stage: Stage, line: str, identity: str, **more: Any) -> None:
    stage.lines[line] = Authorship(commit="2" * 40, identity=identity, **more)


def _robot(stage: Stage) -> None:
    """The pipeline checks out, commits and installs; whoever pushed is in the forge's log, not here."""
    _claims(stage, f"{TOOL}:77", "ci-bot <ci@example.invalid>")
    _strange_thread(stage, _file(SERVICE))


def _deployed(stage: Stage) -> None:
    _claims(stage, f"{TOOL}:77", "victim-b <victim-b@example.invalid>")
    _strange_thread(stage, _file(ROOT))


def _forged_and_open(stage: Stage) -> None:
    _claims(stage, f"{TOOL}:77", "victim-b <victim-b@example.invalid>", signed="none")
    _strange_thread(stage, _file(VICTIM_B, 0o664, (VICTIM_B, 0o775)))


def _beside_approved(stage: Stage) -> None:
    stage.approve = (Approval(check="inputs", place="/job/train.py:14", reason="learning rate by hand"),)
    _config_changed(stage, read_as=VICTIM_A, now=_file(VICTIM_A), step=6)
    stage.at[6] = _not_bad(stage.at[6])
    _strange_thread(stage, _file(INSIDER))


def _not_bad(act: Callable[[Job], None]) -> Callable[[Job], None]:
    def wrapped(job: Job) -> None:
        act(job)
        job.stage.bad_from = None

    return wrapped


def _mixed() -> list[Script]:
    late: Any = {"word": "SUSPECT", "loss": "time"}
    memory = {"out_of_memory": {"group": 1, "host": 1, "named": []}}
    his: Any = {"uid": INSIDER, "loginuid": INSIDER, "session": 7, "ancestry": _shell("bash", "sshd")}

    def memory_first(stage: Stage) -> None:
        stage.at[10] = lambda job: _ends(job, meant=False, **memory)
        _killed(stage, step=14, **his)

    def twice(stage: Stage) -> None:
        _killed(stage, step=11, **his)
        _killed(stage, step=19, **his)

    def crash_after(stage: Stage) -> None:
        _killed(stage, step=11, **his)
        stage.at[20] = lambda job: _ends(job, meant=False, signal=11)

    def submitted_as_victim(stage: Stage) -> None:
        stage.says = {"submitter": {"slurm": {"SLURM_JOB_ID": "9", "SLURM_JOB_USER": "victim-b"}}}
        _killed(stage, **his)

    return [
        _scene("memory ran out, and a kill", "act", _shows(INSIDER, **late), memory_first),
        _scene("two kills", "act", _shows(INSIDER, **late), twice),
        _scene("a kill, and a crash", "act", _shows(INSIDER, **late), crash_after),
        _scene("scheduler's variables name the victim", "frame", _shows(INSIDER, **late), submitted_as_victim),
        _scene(
            "sleeps in the service account's file",
            "act",
            _shows(SERVICE, loss="time"),
            lambda s: _sleeps_beside_load(s, SERVICE, load=False),
        ),
        _scene(
            "sleeps beside honest load",
            "act",
            _shows(INSIDER, loss="time"),
            lambda s: _sleeps_beside_load(s, INSIDER, load=True),
        ),
    ]


def _sleeps_beside_load(stage: Stage, owner: int, *, load: bool) -> None:
    """Some steps sleep in a shared file; one other step is slow because the host is busy, which is nobody's doing."""
    path = "/shared/tools/timing.py"
    _lies(stage, path, _file(owner))

    def sleeps(job: Job) -> None:
        job.slow_ns = int(job.stage.draw.uniform(12, 24) * SECOND)
        frames = [f"{path}:5:wait", f"{SITE}/torch/optim/adamw.py:200:step", "/job/train.py:20:<module>"]
        told = {"ask": job.number, "id": 3, "frames": frames, "same": True, "done": job.number - 1 - job.offset}
        job.says("stack", told | {"since_ns": job.slow_ns})
        body = {"ask": job.number, "why": "asleep", "call": "clock_nanosleep", "samples": 2, "median_ns": 30 * SECOND}
        body |= {"elapsed_ns": job.slow_ns, "cpu_ns": 0, "queue_ns": 0}
        job.add("stall", body, **job.where(0), step=job.number - job.offset)

    def busy(job: Job) -> None:
        extra = 18 * SECOND
        job.slow_ns = extra
        job.stage.lost_ns -= job.ranks * extra

    def told(job: Job) -> None:
        """The window that holds the busy step, told when it is over."""
        pace = {"window_ns": 48 * SECOND, "steps": 1, "samples": 80, "running": 40, "asleep": {}, "timed": 0}
        pace |= {"waits": 0, "cpu_ns": 30 * SECOND, "queue_ns": 18 * SECOND, "throttled": 0, "cpus": 2}
        job.add("pace", pace | {"throttled_ns": 0}, **job.where(2), step=job.number)

    stage.at.update(dict.fromkeys((12, 14, 15, 19, 21), sleeps))
    if load:
        stage.at |= {17: busy, 18: told}


def _nobodys_fault() -> list[Script]:
    none, odd = _shows(None, word="VERIFIED"), _shows(None, word="SUSPECT")
    wrong = _shows(None)

    def daemon(name: str, path: str) -> Callable[[Stage], None]:
        return lambda s: _killed(s, meant=False, comm=name, exe=path, cmdline=[name], ancestry=_shell("systemd"))

    def lost_ledger(stage: Stage) -> None:
        stage.at[stage.step()] = lambda job: _ends(job, meant=False)

    return [
        _scene("killed, and no ledger", "hardware", none, lost_ledger),
        _scene(
            "container engine stops the job", "hardware", none, daemon("containerd-shim", "/usr/bin/containerd-shim")
        ),
        _scene("memory daemon", "hardware", odd, daemon("earlyoom", "/usr/bin/earlyoom")),
        _scene(
            "owner stops her own job",
            "honest",
            odd,
            lambda s: _killed(s, meant=False, uid=VICTIM_A, loginuid=VICTIM_A, session=3, ancestry=_shell("bash")),
        ),
        _scene(
            "backup restored an older checkpoint",
            "honest",
            wrong,
            lambda s: _model_file(s, [ROOT, 0o644, VICTIM_B, 0o755], "E6", "step 500 lies where step 900 was sealed"),
        ),
        _scene(
            "administrator upgraded a library",
            "honest",
            wrong,
            lambda s: _module(s, f"{SITE}/torch/optim/adamw.py", "torch.optim.adamw", _file(ROOT)),
        ),
        _scene(
            "owner upgraded a library of her own",
            "honest",
            wrong,
            lambda s: _module(s, f"{SITE}/torch/optim/adamw.py", "torch.optim.adamw", _file(VICTIM_A)),
        ),
        _scene("two flipped bits", "hardware", odd, _two_bits),
    ]


def _two_bits(stage: Stage) -> None:
    import base64
    import struct

    def number(value: float) -> Body:
        return {"f": "<f", "b": base64.b64encode(struct.pack("<f", value)).decode()}

    def act(job: Job) -> None:
        changed = {"name": "blocks.0.up.weight", "what": "weight", "differ": 1, "of": 64, "at": [job.number]}
        changed |= {"old": number(1.5), "new": number(-1.5)}
        told = {"after": "c" * 16, "before": "d" * 16, "expected": "e" * 16, "tensors": 4, "held": 3}
        job.extra["weights"] = told | {"changed": [changed], "changed_tensors": 1}

    stage.at[9] = act
    stage.at[18] = act


CASEBOOK: tuple[Script, ...] = (*_shared_accounts(), *_files(), *_mixed(), *_nobodys_fault())
