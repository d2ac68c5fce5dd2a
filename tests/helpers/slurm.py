"""A Slurm of one node, started for a test: munge, controller and node daemon on loopback, in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo")
PATIENCE_SECONDS = 60.0


def missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    gone = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if gone:
        return f"not installed: {', '.join(gone)}"
    return None if os.geteuid() == 0 else "slurmd has to be started by root"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Variables that lead `sbatch` to it. Its daemons are ended with the block."""
    folder.chmod(0o755)
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir()
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    (folder / "munge").chmod(0o711)
    (folder / "slurm.conf").write_text(_configuration(folder))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    env = os.environ | {"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    words = [
        ["munged", "--foreground", "--force", "--key-file", str(key), "--socket", str(folder / "munge" / "socket"),
         "--pid-file", str(folder / "munge" / "pid"), "--log-file", str(folder / "munge" / "log"),
         "--seed-file", str(folder / "munge" / "seed")],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "node1"],
    ]  # fmt: skip
    started: list[subprocess.Popen[bytes]] = []
    with (folder / "said").open("wb") as said:
        try:
            for command in words:
                started.append(subprocess.Popen(command, env=env, stdout=said, stderr=said, start_new_session=True))
                if command[0] == "munged":
                    _wait(lambda: (folder / "munge" / "socket").exists(), "munge")
            _wait(lambda: _idle(env), f"the node ({(folder / 'said').read_text(errors='replace')[-2000:]})")
            yield env
        finally:
            for process in reversed(started):
                process.terminate()
            for process in reversed(started):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=20)
                process.kill()
                process.wait()


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _idle(env: dict[str, str]) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format", "%T"], env=env, capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout.strip() == "idle"


def _wait(ready: object, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise RuntimeError(f"Slurm: {what} did not come up")
        time.sleep(0.2)


def _port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _configuration(folder: Path) -> str:
    return f"""
ClusterName=test
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={_port()}
SlurmdPort={_port()}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
NodeName=node1 NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=audit Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""
