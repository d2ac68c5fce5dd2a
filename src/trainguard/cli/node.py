"""`trainguard node`: the signals of a whole machine, recorded, sealed and told to the runs they concern. Needs root."""

from __future__ import annotations

import os
import platform
import signal
import time
from pathlib import Path

import click

from trainguard.archive import RunWriter
from trainguard.cli._session import run_id, warn
from trainguard.envelope import load_or_create_key
from trainguard.errors import Unavailable
from trainguard.home import Home
from trainguard.log import Log
from trainguard.watch import node

SEGMENT_SECONDS = 2.0
HEARTBEAT_SECONDS = 10.0


@click.command("node")
@click.option("--name", help="Name the record; default: node, date, time and a random suffix.")
@click.option(
    "--socket", "path", default=lambda: os.environ.get("TRAINGUARD_NODE", node.SOCKET), help="Where runs ask."
)
@click.option("--tracing", type=click.Path(path_type=Path), help="Folder of tracefs [/sys/kernel/tracing].")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(name: str | None, path: str, tracing: Path | None, quiet: bool) -> int:
    """Record who signals whom on this machine, also from outside the jobs, until it is ended by SIGTERM or Ctrl-C."""
    try:
        trace = node.Trace(node.find_tracing(tracing))
    except node.Unsupported as error:
        raise Unavailable(f"no node's ledger here: {error}", next_step=_next_step(str(error))) from error
    try:
        _keep(trace, path, run_id(name or f"node-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"), quiet=quiet)
    finally:
        trace.close()
    return 0


def _keep(trace: node.Trace, path: str, name: str, *, quiet: bool) -> None:
    """Record, seal and tell until a signal asks us to end."""
    home = Home.find()
    home.prepare()
    reads, writes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    log = Log.open(home.log, home.keys / "log.key")
    desk = node.Desk(path)
    writer = RunWriter(home, name, log, load_or_create_key(home.keys / "attestation.pem"))
    try:
        start = {"command": ["trainguard", "node"], "host": platform.node(), "kernel": platform.release(), "lock": None}
        writer.begin(start)
        writer.add("start", start)
        writer.add("node", {"state": "on", "socket": path})
        writer.seal()
        if not quiet:
            warn(f"node {name}: every signal of this machine is recorded; runs ask at {path}")
        next_seal = next_heartbeat = time.monotonic()
        for event in node.serve(trace, desk, reads):
            if event is not None:
                writer.add("outside", event, pid=event["sender"]["pid"], uid=event["sender"].get("uid"))
            now = time.monotonic()
            if now >= next_seal:
                writer.seal()
                next_seal = now + SEGMENT_SECONDS
            if now >= next_heartbeat:
                writer.add("heartbeat", {"lost": trace.lost, "runs": len(desk.clients)})
                next_heartbeat = now + HEARTBEAT_SECONDS
        writer.add("end", {"status": 0, "signal": None, "lost": trace.lost})
    finally:
        writer.seal(final=True)
        writer.close()
        desk.close()
        log.publish()
        log.close()


def _next_step(reason: str) -> str:
    if "root" in reason:
        return "start it as root, once per machine: sudo trainguard node"
    return "mount it: mount -t tracefs nodev /sys/kernel/tracing"
