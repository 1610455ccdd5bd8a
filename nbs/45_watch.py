# %% [markdown]
# # Watch: one rank fails, all end, and say why
#
# > Ranks join a job, watch each other over plain sockets, and end together within a moment of the first failure.
#
# Ranks wait for each other many times in a step. When one of them dies, what becomes of the rest depends on
# where they happened to stand. Over gloo they mostly get `Connection closed by peer`, a traceback from each
# about everything but the cause. Over NCCL they wait, at full price, until a timeout of minutes. Launchers help on
# their own host at best.
#
# So every rank holds one idle TCP connection to rank 0, beside whatever the collectives use, with a thread at
# each end. What the operating system does with a connection is all the monitoring there is:
#
# | at rank 0, from rank $r$ | it means | the verdict |
# |---|---|---|
# | "well", from all ranks | each ended its work | all leave, together |
# | "failed: ..." | an exception | its cause, unless a death explains it (half a second's patience) |
# | the connection closes, nothing said | killed or crashed | that, at once |
# | no keepalive answer for 12 s | the host is gone | that, at once |
#
# The verdict goes to everybody. A thread that gets one ends its process with `os._exit`, which no collective can
# hold up. And a rank with an exception waits for the verdict before it lets go of anything: its peers keep
# their connections to it, so the first failure makes no second ones.
#
# Nothing is sent while all is well; the training step does not know that it is watched.

# %%
#| default_exp parallel.watch

# %%
#| export
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from pithtrain.config import REFUSALS, UserError, describe_refusal
from pithtrain.parallel.launch import Launch

# %% [markdown]
# ## Meeting
#
# Ranks meet at a *store*, a small table that one process holds and all can read: torchrun's own, or rank 0's.
# There rank 0 writes where its watch listens; later the process groups use the same store. Every key begins with the
# job's own name: who reaches another job's store, on a port that both were given, finds nothing there.


# %%
#| export
def open_store(launch: Launch, patience: timedelta) -> Store:
    """The job's store, once rank 0 was there. Raises UserError where rank 0 cannot open it, or is not met in time."""
    here = launch.rank == 0 and not launch.hosted
    try:
        # Does not wait for all ranks: one that failed on its way is told apart by the watch, not by a timeout.
        store = TCPStore(launch.address, launch.port, None, here, patience, wait_for_workers=False)
        store = PrefixStore(launch.job, store)
        if launch.rank:
            store.wait(["watch"], patience)
        return store
    except dist.DistError as error:
        what = "cannot be opened by rank 0; is another run using it?" if here else "does not answer; is rank 0 there?"
        reason = str(error).splitlines()[0]
        raise UserError(f"MASTER_ADDR, MASTER_PORT: {launch.address}:{launch.port} {what} ({reason})") from None


# %% [markdown]
# ## What is reported
#
# A failure travels as one line. A user's mistake and an interruption are told without a traceback, with the
# exit codes that [the command line](90_cli.py) gives them.


# %%
#| export
class Failure(NamedTuple):
    """Why a job ends."""

    rank: int
    code: int  #: with which all ranks exit
    cause: str  #: one line that names the rank, its host and its process
    message: str = ""  #: the error alone, as `describe` gives it; empty for a death


GONE = "was killed or crashed, or its host is gone"


# %%
#| export
def describe(error: BaseException) -> tuple[int, str]:
    """The exit code of an exception, and one line about it."""
    if isinstance(error, UserError):
        return 2, str(error)[:2000]
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, REFUSALS):
        return 2, describe_refusal(error)
    return 1, traceback.format_exception_only(error)[-1].splitlines()[0][:300]


# %%
for error in (UserError("model.top_k: 32 is more than model.experts, 16"), KeyboardInterrupt(), ValueError("no\nway")):
    print(describe(error))

# %% [markdown]
# ## The connection
#
# Two ways in which the system would tell us nothing have to be closed. A host that loses its power says no
# goodbye: TCP can be made to ask after it. And a forked child (of a data loader, say) holds the connection too,
# which then outlives the rank that was killed.


# %%
#| export
def set_up(connection: socket.socket) -> None:
    """Let `connection` fail within 12 s of its other host's end, and close as soon as this process ends."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):  # macOS has names of its own and keeps its defaults
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    os.register_at_fork(after_in_child=connection.close)


# %%
#| export
def read_lines(connection: socket.socket) -> Iterator[bytes]:
    """The lines of a connection until it ends or fails. (A file object would keep it open in forked children.)"""
    rest = b""
    with suppress(OSError):
        while data := connection.recv(4096):
            *lines, rest = (rest + data).split(b"\n")
            yield from lines


# %%
here, there = socket.socketpair()
there.sendall(b'["token", 2, "rank 2"]\nnull\nhal')
there.close()
print(*read_lines(here))


# %% [markdown]
# ## The referee
#
# Rank 0's end: a thread for each rank, which sleeps in a read. `judge` tells the verdict, of which there is
# one; who joins later hears it too. A stranger on the port does not know the token, and is sent away.


# %%
#| export
def later(seconds: float, what: Callable, *arguments: object) -> None:
    """Call `what` in so many seconds, if this process is still there."""
    timer = threading.Timer(seconds, what, arguments)
    timer.daemon = True
    timer.start()


# %%
#| export
class Referee:
    """Hears all ranks of a job and tells each of them, once, how the job ends.

    `start`: seconds within which all ranks must have joined. `grace`: how long an exception waits for a death
    that explains it; both ends of a broken connection notice, and the survivor may be heard first."""

    def __init__(self, world_size: int, start: float, grace: float) -> None:
        family = socket.AF_INET6 if (both := socket.has_dualstack_ipv6()) else socket.AF_INET
        self.server = socket.create_server(("", 0), family=family, backlog=world_size, dualstack_ipv6=both)
        self.port, self.token = self.server.getsockname()[1], secrets.token_hex(16)
        self.world_size, self.start, self.grace = world_size, start, grace
        self.ranks: dict[int, socket.socket] = {}
        self.well: set[int] = set()
        self.verdict: bytes | None = None
        self.lock = threading.Lock()
        later(start, self.count)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            connection, _ = self.server.accept()
            threading.Thread(target=self.hear, args=[connection], daemon=True).start()

    def hear(self, connection: socket.socket) -> None:
        """One rank, from its greeting to the end of its connection."""
        set_up(connection)
        lines = read_lines(connection)
        try:
            token, rank, who = json.loads(next(lines, ""))
        except (ValueError, TypeError):
            token = None
        with self.lock:
            if token != self.token or rank in self.ranks:
                return connection.close()
            self.ranks[rank] = connection
            if self.verdict:
                connection.sendall(self.verdict)
        for line in lines:
            if report := json.loads(line):
                code, message = report
                later(self.grace, self.judge, Failure(rank, code, f"{who} failed: {message}", message))
            else:
                self.well.add(rank)
                if len(self.well) == self.world_size:
                    self.judge(None)
        self.judge(Failure(rank, 1, f"{who} {GONE}"))

    def judge(self, verdict: Failure | None) -> None:
        """Tell all ranks the verdict, unless there was one; None is the good one."""
        with self.lock:
            if self.verdict is None:
                self.verdict = json.dumps(verdict).encode() + b"\n"
                for rank in sorted(self.ranks, reverse=True):  # rank 0 last: hearing it, this process ends
                    with suppress(OSError):
                        self.ranks[rank].sendall(self.verdict)

    def count(self) -> None:
        """Judge the first rank that did not join in time."""
        missing = [rank for rank in range(self.world_size) if rank not in self.ranks]
        if missing:
            cause = f"rank {missing[0]} did not join within {self.start:.0f} s; missing are ranks {missing}"
            self.judge(Failure(missing[0], 1, cause[:300]))


# %% [markdown]
# ## A rank's end
#
# The thread waits for one line. Its end of the connection tells it about rank 0 what the referee learns about
# the others. Who speaks: the rank that failed shows its traceback, rank 0 the one line. When rank 0 is gone,
# the first two ranks of each host stand in for it.


# %%
#| export
class Member:
    """A rank's connection to the referee, and the thread that ends this process on a failure anywhere.

    `who` is this rank, and `zero` rank 0, with host and process."""

    def __init__(self, launch: Launch, connection: socket.socket, who: str, zero: str) -> None:
        self.launch, self.connection, self.who, self.zero = launch, connection, who, zero
        self.error: BaseException | None = None
        set_up(connection)
        self.thread = threading.Thread(target=self.listen, daemon=True, name="watch")
        self.thread.start()

    def send(self, report: list | None) -> None:
        with suppress(OSError):  # rank 0 is gone: the thread finds out too
            self.connection.sendall(json.dumps(report).encode() + b"\n")

    def listen(self) -> None:
        """Wait for the verdict; return on a good one, end the process on any other."""
        verdict = json.loads(next(read_lines(self.connection), b"false"))
        if verdict is False:
            self.stop(Failure(0, 1, f"{self.zero} {GONE}"), self.launch.local_rank < 2)
        elif verdict is not None:
            self.stop(Failure(*verdict), self.launch.rank == 0)

    def finish(self) -> None:
        """Say that this rank ended well, and wait until all have."""
        self.send(None)
        self.thread.join()
        self.connection.close()

    def fail(self, error: BaseException) -> None:
        """Report an exception and end as the verdict says, which may blame another rank. Does not return."""
        self.error = error
        code, message = describe(error)
        self.send([code, message])
        self.thread.join(30)
        self.stop(Failure(self.launch.rank, code, f"{self.who} failed: {message}", message), True)  # no verdict

    def stop(self, failure: Failure, speak: bool) -> None:
        """End this process, whatever its other threads are stuck in. Does not return."""
        later(5, os._exit, failure.code)  # should writing hang
        own, error = failure.rank == self.launch.rank, self.error
        if own and error and failure.code == 1:
            sys.excepthook(type(error), error, error.__traceback__)
        if speak and error and failure.code != 1 and describe(error) == (failure.code, failure.message):
            print(f"pithtrain: {failure.message}", file=sys.stderr)  # the same mistake on all ranks: said once
        elif speak:
            why = failure.cause if own else f"rank {self.launch.rank} stops because {failure.cause}"
            print(f"\npithtrain: {why}", file=sys.stderr)  # below what a progress bar left unfinished
        sys.stdout.flush()
        sys.stderr.flush()
        if not own:
            time.sleep(0.3)  # launchers blame the rank that they see end first
        os._exit(failure.code)


# %% [markdown]
# ## The watch
#
# A context: leaving it well waits for all ranks to do the same, so that none is left alone at the end. Leaving
# it with an exception ends the process.


# %%
#| export
@contextmanager
def watch(launch: Launch, start: float = 300.0, grace: float = 0.5) -> Iterator[Store]:
    """Join the job, and end with it: a failure of any rank inside this context ends every rank's process.

    Yields the job's store. `start` and `grace` are the `Referee`'s, in seconds. The exit code is 2 for a UserError,
    130 for an interruption, else 1. Raises UserError where rank 0 cannot be met."""
    store = open_store(launch, timedelta(seconds=start))
    who = f"rank {launch.rank} (host {socket.gethostname()}, process {os.getpid()})"
    if launch.rank == 0:
        referee = Referee(launch.world_size, start, grace)
        store.set("watch", json.dumps([referee.port, referee.token, who]))
    port, token, zero = json.loads(store.get("watch"))
    connection = socket.create_connection((launch.address if launch.rank else "localhost", port), timeout=60)
    member = Member(launch, connection, who, zero)
    member.send([token, launch.rank, who])
    try:
        yield store
        member.finish()
    except BaseException as error:
        member.fail(error)


# %% [markdown]
# The process group goes inside. It is taken down after a good end alone: after a failure that would break the
# connections of the peers and raise in them what hides the cause, and with NCCL it may hang.


# %%
#| export
@contextmanager
def process_group(launch: Launch, store: Store | None, device: torch.device) -> Iterator[torch.device]:
    """torch.distributed over all ranks; yields this rank's device, for CUDA the one of its local rank.

    gloo on CPUs; on GPUs NCCL, with gloo for tensors that live on the host. Does nothing for one rank."""
    if launch.world_size == 1:
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        backend, count = "cpu:gloo,cuda:nccl", torch.cuda.device_count()
        index = launch.local_rank if count > 1 else 0  # SLURM may show each rank one GPU, its own
        if index >= count:
            raise UserError(f"LOCAL_RANK: {index}, but this host has {count} GPUs; start at most {count} ranks on it")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=PrefixStore("ranks", store), rank=launch.rank, world_size=launch.world_size)
    yield device
    dist.destroy_process_group()


# %% [markdown]
# ## Watching it happen
#
# Two ranks add numbers up, over and over. In the middle of it rank 1 is killed the hard way, as the kernel does
# when memory runs out; or it has a bug; or both ranks find the same mistake of the user. Below: all that appears
# on screen, and when it was over. Three tenths of a second are on purpose, so that launchers see the right rank
# end first; an exception waits another half.

# %%
import subprocess
import tempfile
from pathlib import Path

worker = """
import os, signal, sys, threading, time
import torch, torch.distributed as dist
from pithtrain.config import UserError
from pithtrain.parallel.launch import find_launch
from pithtrain.parallel.watch import process_group, watch

launch, how = find_launch(os.environ), sys.argv[1]
with watch(launch) as store, process_group(launch, store, torch.device("cpu")):
    for step in range(100):
        dist.all_reduce(torch.ones(1000))
        if step == 50 and launch.rank == 0:
            print(time.time(), flush=True)
        if step == 50 and how == "killed" and launch.rank == 1:
            threading.Timer(0.005, os.kill, [os.getpid(), signal.SIGKILL]).start()
        if step == 50 and how == "bug" and launch.rank == 1:
            torch.ones(2) + torch.ones(3)
        if step == 50 and how == "mistake":
            raise UserError("tiny.toml: optimizer.warmup: 90 is more than train.steps, 80")
        time.sleep(0.01)
"""

program = "import sys; from pithtrain.parallel.launch import launch; sys.exit(launch(2, sys.argv[1:]))"
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "worker.py"
    path.write_text(worker)
    for how in ("killed", "bug", "mistake"):
        run = subprocess.run([sys.executable, "-c", program, path, how], capture_output=True, text=True)
        seconds = time.time() - float(run.stdout)
        print(f"--- {how}: all over after {seconds:.1f} s, exit code {run.returncode}", run.stderr, sep="\n")
        assert seconds < 15 and run.returncode == {"killed": 137, "bug": 1, "mistake": 2}[how]
        assert {"killed": "rank 1 (", "bug": "rank 1 (", "mistake": "warmup"}[how] in run.stderr

# %% [markdown]
# A rank that stops without dying, held by a debugger or by a disk that does not answer, is not noticed here:
# its host answers for it. That is left to the timeouts of the collectives.
#
# Next: ranks that live and work together, in a [mesh](40_mesh.py), and [how the pipeline is cut](50_schedule.py).
