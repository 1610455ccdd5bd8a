# %% [markdown]
# # Launch: who am I among how many?
#
# > A process reads its place in the job from what its launcher left in the environment; one host needs no launcher.
#
# A job of $N$ ranks is the same program started $N$ times. What differs is a handful of environment
# variables, and each launcher has its own names for them:
#
# | a process needs | `torchrun`, `pithtrain launch` | SLURM's `srun` |
# |---|---|---|
# | its rank | `RANK` | `SLURM_PROCID` |
# | the number of ranks | `WORLD_SIZE` | `SLURM_STEP_NUM_TASKS` (or `SLURM_NTASKS`) |
# | its place on its host, which picks its GPU | `LOCAL_RANK` | `SLURM_LOCALID` |
# | the host of rank 0 | `MASTER_ADDR` | the first of `SLURM_STEP_NODELIST` |
# | a port there, to meet at | `MASTER_PORT` | made from the job's and the step's number |
# | whether it met its own job there | | `SLURM_JOB_ID` and `SLURM_STEP_ID` again: two jobs can have one port |
#
# Nothing of all that: one process. So `pithtrain train CONFIG` is the command everywhere, and whatever starts
# it decides how many ranks there are.

# %%
#| default_exp parallel.launch

# %%
#| export
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from pithtrain.config import UserError

# %% [markdown]
# ## SLURM's list of hosts
#
# SLURM folds its hosts: `gpu[003-007,12],login1`. A range counts with as many digits as its first number
# has; a name may hold several brackets, of which the last turns fastest.


# %%
#| export
def expand_hosts(nodelist: str) -> list[str]:
    """The hosts of a SLURM node list, in its order. Raises ValueError for what is not one."""
    hosts = []
    for word in re.split(r",(?![^\[]*\])", nodelist):  # commas within brackets do not part hosts
        if not re.fullmatch(r"([\w.-]|\[\d+(-\d+)?(,\d+(-\d+)?)*\])+", word):
            raise ValueError(f"{word!r} is not a host or a bracketed range of hosts")
        names = [""]
        for text, ranges in re.findall(r"([^\[]+)|\[([^\]]+)\]", word):
            numbers = []
            for low, high in re.findall(r"(\d+)(?:-(\d+))?", ranges):
                numbers += [str(n).zfill(len(low)) for n in range(int(low), int(high or low) + 1)]
            names = [name + part for name in names for part in (numbers if ranges else [text])]
        hosts += names
    return hosts


# %%
for nodelist in ("gpu7", "gpu[003-007,12],login1", "rack[1-2]node[08-10]"):
    print(f"{nodelist:<26}", *expand_hosts(nodelist))
assert expand_hosts("gpu[8-11]") == ["gpu8", "gpu9", "gpu10", "gpu11"]

# %% [markdown]
# ## Finding the launch
#
# A function of the environment and of nothing else, so that any launcher can be tried on paper. It answers
# with a value. What is there must be complete and fit together: a rank that guessed would leave the others
# waiting for it.


# %%
#| export
class Launch(NamedTuple):
    """The place of one process in its job, and where the job meets."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  #: among the ranks of its host
    address: str = "localhost"  #: host of rank 0
    port: int = 0  #: where the job's store listens on that host
    hosted: bool = False  #: the launcher holds the store, as torchrun does, and not rank 0
    job: str = ""  #: tells the job from another that meets at the same port


# %%
#| export
def read_number(environment: Mapping[str, str], name: str, because: str, low: int, high: int) -> int:
    """The variable `name` as a number from `low` to `high`; else a UserError, `because` saying why it is needed."""
    text = environment.get(name)
    if text is None:
        raise UserError(f"{name}: not set, although {because}; a launcher sets both, a single process needs neither")
    if not re.fullmatch(r"\d+", text) or not low <= int(text) <= high:
        raise UserError(f"{name}: {text!r} is out of range, expected a number from {low} to {high} since {because}")
    return int(text)


# %% [markdown]
# Which launcher was it? `torchrun` goes first: started by `srun` once on each host, it leaves both kinds of
# variables to its workers. And in SLURM only a *step*, which is what `srun` makes, has tasks. The batch script
# itself has a `SLURM_PROCID` too, and the number of tasks that it *could* start, but it is one process.


# %%
#| export
def find_launch(environment: Mapping[str, str]) -> Launch:
    """What the launcher (torchrun, `pithtrain launch`, srun, or none) told this process, from its environment.

    Raises UserError naming the variable that is missing, out of range or at odds with another."""
    step = "SLURM_STEP_NUM_TASKS" in environment or "SLURM_STEP_ID" in environment
    torchrun = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment]
    if torchrun:
        own, size, local = "RANK", "WORLD_SIZE", "LOCAL_RANK"
        because = f"{torchrun[0]} is {environment[torchrun[0]]}"
    elif step or environment.get("SLURM_PROCID", "0") != "0":
        size = "SLURM_NTASKS" if step and "SLURM_STEP_NUM_TASKS" not in environment else "SLURM_STEP_NUM_TASKS"
        own, local = "SLURM_PROCID", "SLURM_LOCALID"
        because = "srun started this process"
    else:
        return Launch()
    world_size = read_number(environment, size, because, 1, 10**6)
    many = f"{size} is {world_size}"
    rank = read_number(environment, own, many, 0, world_size - 1)
    local_rank = read_number(environment, local, f"{own} is {rank}", 0, rank)
    if world_size == 1:
        return Launch()
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if not torchrun and not address:
        name = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environment else "SLURM_JOB_NODELIST"
        try:
            address = expand_hosts(environment.get(name, ""))[0]
        except ValueError as error:
            raise UserError(f"{name}: {error}; set MASTER_ADDR to the host of rank 0") from None
    if not torchrun and not port:
        job = read_number(environment, "SLURM_JOB_ID", many, 0, 2**32)
        number = read_number(environment, "SLURM_STEP_ID", many, 0, 2**32)
        port = str(12_000 + (97 * job + number) % 20_000)  # below the ports that Linux gives out by itself
    if not address:
        raise UserError(f"MASTER_ADDR: not set, although {many}; set it to the host of rank 0")
    port = read_number({"MASTER_PORT": port} if port else {}, "MASTER_PORT", many, 1, 65_535)
    hosted = torchrun != [] and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    job = "" if torchrun else "{}.{}".format(*map(environment.get, ("SLURM_JOB_ID", "SLURM_STEP_ID")))
    return Launch(rank, world_size, local_rank, address, port, hosted, job)


# %%
torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu7", "MASTER_PORT": "29500"}
batch = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu[003-004]"}
srun = {**batch, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "0"}
examples = {"nothing": {}, "torchrun": torchrun, "batch script": batch, "srun": srun, "both": srun | torchrun}
for name, environment in examples.items():
    print(f"{name:<13}", find_launch(environment))
assert find_launch(batch) == find_launch({}) == Launch()

# %% [markdown]
# What does not fit together is named:

# %%
wrong = [
    {name: value for name, value in torchrun.items() if name != "WORLD_SIZE"},
    torchrun | {"RANK": "8"},
    torchrun | {"MASTER_PORT": "ssh"},
    srun | {"SLURM_JOB_NODELIST": "gpu[003"},
    {name: value for name, value in srun.items() if name != "SLURM_LOCALID"},
]
for environment in wrong:
    try:
        find_launch(environment)
        raise AssertionError(environment)
    except UserError as error:
        print(error)

# %% [markdown]
# ## Starting ranks on one host
#
# `launch` is all the launcher that one host needs. It starts the ranks, hands on what is asked of it, and
# waits. The details that make it pleasant:
#
# - **Ctrl-C** reaches every rank exactly once. A terminal sends it to a whole process group, so the ranks get
#   groups of their own and `launch` passes signals on: the first asks the trainer to save and stop, the second
#   ends it at once. It sets no limit to how long saving may take.
# - **The exit code** is that of the first rank that failed: 2 stays a user's mistake, 130 stays "stopped and
#   saved".
# - **Threads**: the cores are shared out evenly, unless `OMP_NUM_THREADS` says otherwise.
# - **Silence**: a rank whose peer ends warns with a page of C++, below which the one line that says why would be lost;
#   `TORCH_CPP_LOG_LEVEL` brings such warnings back.
# - **A failed rank** ends the others through [the watch](45_watch.py), which knows the cause. `launch` itself only
#   ends what is still there after ten seconds: ranks that failed before they joined.


# %%
#| export
def launch(nproc: int, command: list[str], grace: float = 10.0) -> int:
    """Run `python *command` as ranks 0 to `nproc` - 1 on this host; return the first failure's exit code, else 0.

    SIGINT, SIGTERM and SIGHUP are passed on to the ranks. `grace`: seconds that ranks have to end by themselves
    after one of them failed."""
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {"OMP_NUM_THREADS": str(max(1, cores // nproc)), "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
    shared |= {"WORLD_SIZE": str(nproc), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks: list[subprocess.Popen] = []

    def forward(number: int, frame: Any) -> None:
        for rank in ranks:
            rank.send_signal(number)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    code, deadline = 0, float("inf")
    try:
        for rank in range(nproc):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            whole = [sys.executable, *command]
            ranks.append(subprocess.Popen(whole, env=environment, stdin=subprocess.DEVNULL, process_group=0))
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
            failed = [rank.returncode for rank in ranks if rank.poll()]
            if failed and not code:
                code = failed[0] if failed[0] > 0 else 128 - failed[0]  # as a shell reports a signal
                deadline = time.monotonic() + grace
    finally:
        left = [number for number, rank in enumerate(ranks) if rank.poll() is None]
        if left:
            print(f"pithtrain: ending ranks {left}, which a failed rank left waiting", file=sys.stderr)
        for number in left:
            ranks[number].kill()
            ranks[number].wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code


# %% [markdown]
# Three processes, each saying who it is. `launch` writes to the terminal, so this example runs it in a process
# whose output is caught.

# %%
who = "import os; from pithtrain.parallel.launch import find_launch; print(find_launch(os.environ))"
program = f"from pithtrain.parallel.launch import launch; raise SystemExit(launch(3, ['-c', {who!r}]))"
run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
print(*sorted(run.stdout.splitlines()), sep="\n")
assert run.returncode == 0 and run.stdout.count("world_size=3") == 3, run.stderr

# %% [markdown]
# And the exit code of a rank that fails is the exit code of all:

# %%
fails = "import os, sys; sys.exit(7 if os.environ['RANK'] == '1' else 0)"
program = f"from pithtrain.parallel.launch import launch; raise SystemExit(launch(2, ['-c', {fails!r}]))"
code = subprocess.run([sys.executable, "-c", program]).returncode
print("exit code", code)
assert code == 7

# %% [markdown]
# Several hosts need a launcher that reaches them: `torchrun --nnodes 4 --nproc-per-node 8 ... -m pithtrain.cli
# train CONFIG` on each, or `srun --kill-on-bad-exit=1 --ntasks-per-node 8 pithtrain train CONFIG` in a SLURM job.
#
# Next: how the ranks meet, and how [a failure of one ends them all](45_watch.py).
