"""Who am I, and what happens when a rank fails: within seconds, everywhere, with the first cause on screen.

Most jobs here are plain processes with SLURM's variables, forked from a server that has torch imported; the
launchers start real ones. Times are printed (`pytest -s`), and bounded loosely.
"""

import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pithtrain.config import UserError
from pithtrain.parallel.launch import Launch, expand_hosts, find_launch

SECONDS = 15.0

# --- the environment ---

ranges = st.builds(lambda low, more, width: (low, low + more, width), *[st.integers(0, 120)] * 2, st.integers(1, 5))
parts = st.one_of(st.from_regex(r"[a-z][a-z0-9.-]{0,5}", fullmatch=True), st.lists(ranges, min_size=1, max_size=3))


def digits(low: int, high: int, width: int) -> list[str]:
    return [f"{number:0{width}d}" for number in range(low, high + 1)]


def fold(part: str | list) -> str:
    if isinstance(part, str):
        return part
    pieces = [(digits(low, low, width)[0], digits(high, high, width)[0]) for low, high, width in part]
    return "[" + ",".join(low if low == high else f"{low}-{high}" for low, high in pieces) + "]"


@given(st.lists(st.lists(parts, min_size=1, max_size=3), min_size=1, max_size=4))
def test_a_folded_list_of_hosts_unfolds(words):
    expected = []
    for word in words:
        columns = [[p] if isinstance(p, str) else [d for piece in p for d in digits(*piece)] for p in word]
        if len(columns) == 3 and len(columns[0]) * len(columns[1]) * len(columns[2]) > 10_000:
            return
        expected += ["".join(row) for row in itertools.product(*columns)]
    assert expand_hosts(",".join("".join(map(fold, word)) for word in words)) == expected


@pytest.mark.parametrize("text", ["", "gpu[", "gpu[1-]", "gpu[a-b]", "gpu]1[", "a,,b", "a b", "gpu[1-2"])
def test_what_is_no_list_of_hosts_is_refused(text):
    with pytest.raises(ValueError, match="is not a host"):
        expand_hosts(text)


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu7", "MASTER_PORT": "29500"}
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
SRUN = {
    **BATCH,
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_ID": "3",
    "SLURM_JOB_NODELIST": "login1,gpu[003-006]",
    "SLURM_STEP_NODELIST": "gpu[003-006]",
}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


def test_each_launcher_is_understood():
    assert find_launch({}) == find_launch({"MASTER_ADDR": "x", "PATH": "y"}) == Launch()
    assert find_launch(BATCH) == Launch()  # a batch script is one process, whatever srun could start in it
    assert find_launch(TORCHRUN) == find_launch(SRUN | TORCHRUN) == Launch(5, 8, 1, "gpu7", 29500)
    assert find_launch(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).hosted
    found = find_launch(SRUN)
    assert found[:4] == (5, 8, 1, "gpu003") and not found.hosted and found.job == "4711.3"
    assert find_launch(without(SRUN, "SLURM_STEP_NODELIST")).address == "login1"
    assert find_launch(without(SRUN, "SLURM_STEP_NUM_TASKS"))[:3] == (5, 8, 1)
    assert find_launch(SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "7"})[3:5] == ("here", 7)
    assert find_launch(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == Launch()
    assert find_launch({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) == Launch()


@given(st.integers(0, 10**9), st.integers(0, 10**4))
def test_the_port_of_a_step_is_one_that_the_system_does_not_give_away(job, step):
    port = find_launch(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
    assert 12_000 <= port < 32_000
    assert port != find_launch(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step + 1)}).port


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        *[(without(TORCHRUN, name), name) for name in TORCHRUN],
        *[(without(SRUN, name), name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")],
        (without(SRUN, "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"), "SLURM_JOB_NODELIST"),
        (without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"), "SLURM_STEP_NUM_TASKS"),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[3"}, "SLURM_STEP_NODELIST"),
        (TORCHRUN | {"RANK": "8"}, "RANK"),
        (TORCHRUN | {"RANK": "-1"}, "RANK"),
        (TORCHRUN | {"RANK": "two"}, "RANK"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        (TORCHRUN | {"LOCAL_RANK": "6"}, "LOCAL_RANK"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR"),
    ],
)
def test_what_is_missing_or_wrong_is_named(environment, name):
    with pytest.raises(UserError, match=f"^{name}: ") as caught:
        find_launch(environment)
    assert "\n" not in str(caught.value)


# --- jobs of plain processes ---

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pithtrain.parallel.watch", "pytest", "hypothesis.strategies"])


class Job(NamedTuple):
    """How a job went: exit codes by rank, what was on screen, and seconds from the first end to the last."""

    codes: list[int]
    screen: str
    seconds: float


def is_there(process: int) -> bool:
    """Not `Process.is_alive`, which a child of the process can keep true."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as probe:
        return probe.getsockname()[1]


def one_rank(work: Callable, rank: int, size: int, port: int, screen: Path, start: float) -> None:
    """A process that srun might have started."""
    file = os.open(screen, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= SRUN | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(size)}
    os.environ |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}
    import torch

    from pithtrain.parallel.watch import process_group, watch

    torch.set_num_threads(1)
    launch = find_launch(os.environ)
    with watch(launch, start=start) as store, process_group(launch, store, torch.device("cpu")):
        work(rank)


def run_job(work: Callable, folder: Path, size: int = 3, absent: int = 0, start: float = 60.0) -> Job:
    """Run `work(rank)` in `size` ranks, of which the last `absent` never come."""
    port, screen = free_port(), folder / "screen"
    ranks = [
        FORKS.Process(target=one_rank, args=(work, rank, size, port, screen, start)) for rank in range(size - absent)
    ]
    for rank in ranks:
        rank.start()
    began, first = time.monotonic(), None
    while any(is_there(rank.pid) for rank in ranks) and time.monotonic() < began + 60:
        time.sleep(0.01)
        if first is None and not all(is_there(rank.pid) for rank in ranks):
            first = time.monotonic()
    seconds = time.monotonic() - (first or began)
    stuck = [number for number, rank in enumerate(ranks) if is_there(rank.pid)]
    for number in stuck:
        ranks[number].kill()
    text = screen.read_text()
    print(f"\n{work.__name__}: all over {seconds:.2f} s after the first\n{text.strip()}")
    assert not stuck, f"ranks {stuck} still ran"
    for rank in ranks:
        rank.join()
    return Job([rank.exitcode for rank in ranks], text, seconds)


def add_up(steps: int = 10_000) -> None:
    import torch
    import torch.distributed as dist

    for _ in range(steps):
        dist.all_reduce(torch.ones(1000))


def die_soon() -> None:
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGKILL]).start()


def two_is_killed(rank: int) -> None:
    if rank == 2:
        die_soon()
    add_up()


def zero_is_killed(rank: int) -> None:
    if rank == 0:
        die_soon()
    add_up()


def live_on() -> None:
    """Leave a child that holds what this process held, until it sees the end of the job (or for six seconds)."""
    time.sleep(0.5)  # until the others have surely joined: a connection that just arrives is not yet cared for
    if os.fork() == 0:
        late = time.monotonic() + 6
        while os.fstat(2).st_size == 0 and time.monotonic() < late:
            time.sleep(0.1)
        os._exit(0)


def parent_two_is_killed(rank: int) -> None:
    if rank == 2:
        live_on()
        die_soon()
    time.sleep(60)


def parent_zero_is_killed(rank: int) -> None:
    if rank == 0:
        live_on()
        die_soon()
    time.sleep(60)


def killed_beside_a_wait(rank: int) -> None:
    """Rank 1 waits, in C++, for what rank 0 never sends; no connection of theirs breaks."""
    import torch
    import torch.distributed as dist

    add_up(1)
    if rank == 2:
        die_soon()
    if rank == 1:
        dist.recv(torch.zeros(1), src=0)
    time.sleep(60)


def one_raises(rank: int) -> None:
    add_up(10)
    if rank == 1:
        raise ValueError("expert 7 is on fire")
    add_up()


def all_raise_at_different_times(rank: int) -> None:
    add_up(10)
    time.sleep(rank * 0.1)
    raise ValueError(f"from {rank}")


def all_find_a_mistake(rank: int) -> None:
    time.sleep(0.2 * (3 - rank))
    raise UserError("tiny.toml: model.top_k: 32 is too many")


def one_finds_a_mistake(rank: int) -> None:
    if rank == 2:
        raise UserError("runs/tiny: the disk is full")
    add_up()


def all_are_interrupted(rank: int) -> None:
    add_up(10)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def all_end_well(rank: int) -> None:
    add_up(20)
    time.sleep([0.8, 0.0, 0.4][rank])


def zero_fails_at_the_end(rank: int) -> None:
    add_up(20)
    if rank == 0:
        time.sleep(0.5)
        raise OSError("no figure today")


@pytest.mark.parametrize("work", [two_is_killed, parent_two_is_killed, killed_beside_a_wait])
def test_a_killed_rank_ends_all_and_is_named(work, tmp_path):
    job = run_job(work, tmp_path)
    assert job.seconds < 5 and job.codes == [1, 1, -signal.SIGKILL]
    assert f"rank 0 stops because rank 2 (host {socket.gethostname()}, process " in job.screen
    assert "was killed" in job.screen and len(job.screen.split("\n")) <= 3  # no secondary tracebacks


@pytest.mark.parametrize("work", [zero_is_killed, parent_zero_is_killed])
def test_a_killed_rank_0_ends_all_and_is_named(work, tmp_path):
    job = run_job(work, tmp_path)
    assert job.seconds < 5 and job.codes == [-signal.SIGKILL, 1, 1]
    assert f"rank 1 stops because rank 0 (host {socket.gethostname()}, process " in job.screen
    assert "Traceback" not in job.screen


def test_an_exception_ends_all_and_shows_its_traceback_alone(tmp_path):
    job = run_job(one_raises, tmp_path)
    assert job.seconds < SECONDS and job.codes == [1, 1, 1]
    assert job.screen.count("Traceback") == 1 and 'raise ValueError("expert 7' in job.screen
    assert job.screen.count("rank 0 stops because rank 1 (") == 1
    assert "failed: ValueError: expert 7 is on fire" in job.screen


def test_of_many_exceptions_the_first_is_shown(tmp_path):
    job = run_job(all_raise_at_different_times, tmp_path)
    assert job.codes == [1, 1, 1]
    assert job.screen.count("Traceback") == 1 and "failed: ValueError: from 0" in job.screen


def test_a_mistake_that_all_ranks_find_is_told_once(tmp_path):
    job = run_job(all_find_a_mistake, tmp_path)
    assert job.codes == [2, 2, 2]
    assert job.screen == "pithtrain: tiny.toml: model.top_k: 32 is too many\n"


def test_a_mistake_that_one_rank_finds_is_told_with_the_rank(tmp_path):
    job = run_job(one_finds_a_mistake, tmp_path)
    assert job.codes == [2, 2, 2] and job.seconds < SECONDS
    assert "rank 0 stops because rank 2 (" in job.screen and "failed: runs/tiny: the disk is full" in job.screen
    assert "Traceback" not in job.screen


def test_an_interruption_is_told_once(tmp_path):
    job = run_job(all_are_interrupted, tmp_path)
    assert job.codes == [130, 130, 130]
    assert job.screen == "pithtrain: interrupted\n"


def test_ranks_that_end_well_at_different_times_end_together(tmp_path):
    job = run_job(all_end_well, tmp_path)
    assert job.codes == [0, 0, 0] and job.screen == ""


def test_a_failure_after_the_others_were_done_is_a_failure_of_all(tmp_path):
    job = run_job(zero_fails_at_the_end, tmp_path)
    assert job.codes == [1, 1, 1] and "OSError: no figure today" in job.screen


def test_a_rank_that_never_comes_is_named(tmp_path):
    job = run_job(all_end_well, tmp_path, absent=1, start=2.0)
    assert job.codes == [1, 1] and "rank 2 did not join" in job.screen


def test_a_store_that_cannot_be_opened_or_met_is_a_mistake_with_its_address():
    from datetime import timedelta

    from pithtrain.parallel.watch import open_store

    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"^MASTER_ADDR, MASTER_PORT: localhost:{port} cannot be opened"):
            open_store(Launch(0, 2, 0, "localhost", port), timedelta(seconds=5))
    with pytest.raises(UserError, match=f"^MASTER_ADDR, MASTER_PORT: localhost:{port} does not answer"):
        open_store(Launch(1, 2, 1, "localhost", port), timedelta(seconds=1))


def test_a_rank_that_meets_another_job_at_its_port_does_not_join_it():
    from datetime import timedelta

    from pithtrain.parallel.watch import open_store

    port = free_port()
    first = open_store(Launch(0, 2, 0, "localhost", port, job="1.0"), timedelta(seconds=30))
    first.set("watch", "here")
    assert open_store(Launch(1, 2, 1, "localhost", port, job="1.0"), timedelta(seconds=30)).get("watch") == b"here"
    with pytest.raises(UserError, match=f"^MASTER_ADDR, MASTER_PORT: localhost:{port} does not answer"):
        open_store(Launch(1, 2, 1, "localhost", port, job="2.0"), timedelta(seconds=1))


def test_a_stranger_neither_joins_nor_disturbs():
    from pithtrain.parallel.watch import Referee

    referee = Referee(1, 60.0, 0.0)
    for greeting in (b"GET / HTTP/1.1\n", b"\xff\xfe\n", b'["guess", 0, "rank 0"]\n', b"7\n", b"[]\n", b""):
        with socket.create_connection(("localhost", referee.port), timeout=10) as stranger:
            stranger.sendall(greeting)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    with socket.create_connection(("localhost", referee.port), timeout=10) as member:
        member.sendall(json.dumps([referee.token, 0, "rank 0"]).encode() + b"\nnull\n")
        assert member.recv(100) == b"null\n"


# --- jobs of launchers ---

WORKER = """
import os, signal, sys, threading, time
import torch, torch.distributed as dist
from pithtrain.parallel.launch import find_launch
from pithtrain.parallel.watch import process_group, watch

launch = find_launch(os.environ)
asked = []
with watch(launch) as store, process_group(launch, store, torch.device("cpu")):
    if sys.argv[1] == "stop":
        signal.signal(signal.SIGINT, lambda *_: asked.append(1))
    dist.barrier()
    print("at work\\n", end="", flush=True)
    if sys.argv[1] == "killed" and launch.rank == 1:
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGKILL]).start()
    while len(asked) == 0:
        if sys.argv[1] == "killed":
            dist.all_reduce(torch.ones(1000))
    time.sleep(1)  # saving, say
print(f"asked {len(asked)} times, {os.environ['OMP_NUM_THREADS']} threads\\n", end="", flush=True)
sys.exit(130)
"""

LAUNCH = "import sys; from pithtrain.parallel.launch import launch; sys.exit(launch(2, sys.argv[1:], grace=1.0))"
TORCHRUN_COMMAND = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def clean_environment() -> dict[str, str]:
    return without(dict(os.environ), "OMP_NUM_THREADS", *TORCHRUN, *SRUN)


@pytest.mark.parametrize("launcher", [TORCHRUN_COMMAND, ["-c", LAUNCH]], ids=["torchrun", "pithtrain launch"])
def test_a_killed_rank_is_named_under_each_launcher(launcher, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, *launcher, tmp_path / "worker.py", "killed"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment()
    ) as job:
        job.stdout.readline()
        began = time.monotonic()
        _, errors = job.communicate(timeout=60)
    seconds = time.monotonic() - began
    print(f"\nall over {seconds:.2f} s after the start of the steps\n{errors}")
    assert job.returncode != 0 and seconds < SECONDS
    assert "rank 0 stops because rank 1 (host" in errors and "was killed" in errors


def test_an_interrupt_reaches_each_launched_rank_once(tmp_path):
    """From a terminal, that is to the whole process group; and the ranks take their time."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-c", LAUNCH, tmp_path / "worker.py", "stop"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
        start_new_session=True,
    ) as job:
        for _ in range(2):
            job.stdout.readline()
        os.killpg(job.pid, signal.SIGINT)
        output, errors = job.communicate(timeout=60)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert job.returncode == 130 and output == f"asked 1 times, {threads} threads\n" * 2
    assert errors == ""


def test_a_rank_that_fails_before_it_joined_ends_the_launch():
    worker = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LAUNCH, "-c", worker], capture_output=True, text=True)
    assert done.returncode == 3 and time.monotonic() - began < SECONDS
    assert done.stderr == "pithtrain: ending ranks [0], which a failed rank left waiting\n"
