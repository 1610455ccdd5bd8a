# %% [markdown]
# # Workspaces: a fresh copy, a sandbox, and what changed
#
# > Gives each attempt a framework of its own, keeps it from the rest of the machine, and takes its diff.
#
# Two attempts must not see each other, and none must see the answers. So each gets a folder:
#
# ```
# ate-XXXX/
#   work/repo   the framework          the agent sees `work`, and writes there alone
#   work/out    answers, artefacts
#   work/home   its home folder
#   work/tmp
#   baseline.git                       what repo was before the agent came; out of its reach
# ```

# %%
#| default_exp workspace

# %%
#| export
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ate_bench.task import PACKAGE, Framework
from pithtrain.config import UserError

# %%
from ate_bench.task import load_framework


# %% [markdown]
# ## The copy
#
# A git checkout is copied as its files stand, with those that are new and not ignored, or as they were at a
# commit. A package comes from its index. What is recorded as the version tells the same copy again, or says
# that it cannot: `-dirty` is a working tree with changes.


# %%
#| export
def call(command: list[str], folder: Path | None = None, data: bytes | None = None) -> bytes:
    """Output of a program. Raises UserError with what it said, if it fails."""
    done = subprocess.run(command, cwd=folder, input=data, capture_output=True)
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise UserError(f"{' '.join(command[:4])}: {said[-1] if said else f'left with {done.returncode}'}")
    return done.stdout


# %%
#| export
def copy_framework(framework: Framework, target: Path) -> str:
    """Fill the new folder `target` with `framework`, less what it excludes; return the version copied."""
    target.mkdir(parents=True)
    if framework.pip:
        command = [framework.python or sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        call([*command, "--disable-pip-version-check", "--target", str(target), framework.pip])
        version = framework.pip
    elif framework.commit:
        git = ["git", "-C", framework.checkout]
        version = call([*git, "rev-list", "--max-count=1", framework.commit, "--"]).decode().strip()
        call(["tar", "-x", "-C", str(target)], data=call([*git, "archive", version]))
    else:
        git = ["git", "-C", framework.checkout]
        version = call([*git, "describe", "--always", "--dirty", "--abbrev=40"]).decode().strip()
        for name in call([*git, "ls-files", "-z", "-co", "--exclude-standard"]).decode().split("\0"):
            source = Path(framework.checkout, name)
            if name and (source.is_symlink() or source.is_file()):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target / name, follow_symlinks=False)
    for name in framework.exclude:
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return version


# %%
here = load_framework("pithtrain")
with tempfile.TemporaryDirectory() as folder:
    version = copy_framework(here, Path(folder) / "repo")
    print(version, *sorted(path.name for path in Path(folder, "repo").iterdir()))
    assert Path(folder, "repo", "pithtrain", "config.py").exists()
    assert not Path(folder, "repo", "ate_bench", "tasks").exists()

# %% [markdown]
# ## What changed
#
# The agent may use git, commit, or break its repository; the diff is taken with another one. Tests that it edited, or
# whose settings it edited, say nothing: they can be put back.

# %%
#| export
TESTS = re.compile(r"(^|/)(tests?/|conftest\.py$|(pytest|tox)\.ini$|setup\.cfg$|pyproject\.toml$)")


# %%
#| export
@dataclass(frozen=True)
class Workspace:
    """The folders of one attempt."""

    root: Path

    @property
    def work(self) -> Path:
        """All that the agent sees of it."""
        return self.root / "work"

    @property
    def repo(self) -> Path:
        """The framework."""
        return self.work / "repo"

    @property
    def out(self) -> Path:
        """Where answers and artefacts go."""
        return self.work / "out"

    @property
    def home(self) -> Path:
        """The agent's home folder."""
        return self.work / "home"

    def unlink(self) -> None:
        """Put plain folders in place of links that an agent made of its own: they may lead anywhere."""
        for folder in (self.repo, self.out, self.home):
            if folder.is_symlink() or not folder.is_dir():
                folder.unlink(missing_ok=True)
                folder.mkdir()

    def files(self, folder: Path, pattern: str) -> list[Path]:
        """The regular files below `folder` that match `pattern` and are not somewhere else, through a link."""
        found = [path for path in sorted(folder.glob(pattern)) if path.is_file() and not path.is_symlink()]
        return [path for path in found if path.resolve().is_relative_to(folder) and os.access(path, os.R_OK)]

    def holds(self, path: Path) -> bool:
        """Whether `path` is in the framework's folder itself, and not somewhere else, through a link."""
        return path.parent.resolve().is_relative_to(self.repo)

    def clear(self) -> None:
        """Take away all that the agent wrote but the framework and `out`, its home as well."""
        for path in self.work.iterdir():
            if path not in (self.repo, self.out):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in ("home", "tmp"):
            (self.work / name).mkdir()

    def git(self, *arguments: str, data: bytes | None = None) -> bytes:
        """Output of git on the framework, by the repository that the agent cannot reach."""
        who = ["-c", "user.name=ate-bench", "-c", "user.email=", "-c", "core.quotePath=false", "-c", "gc.auto=0"]
        where = [f"--git-dir={self.root / 'baseline.git'}", f"--work-tree={self.repo}"]
        return call(["git", *who, *where, *arguments], self.repo, data)

    def remember(self) -> None:
        """Take the framework as it stands for what the diff is against; the agent gets a repository of its own."""
        self.git("init", "--quiet")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "As given")
        shutil.rmtree(self.repo / ".git", ignore_errors=True)
        shutil.copytree(self.root / "baseline.git", self.repo / ".git")
        call(["git", "config", "--unset", "core.worktree"], self.repo)

    def diff(self) -> bytes:
        """What was changed in the framework since `remember`, ignored files left out."""
        for path in filter(self.holds, list(self.repo.rglob("*/.git"))):  # a repository within would hide its files
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.git("add", "--all")
        return self.git("diff", "--cached", "--binary", "HEAD")

    def restore_tests(self) -> None:
        """Put tests, and what sets them up, back as `remember` saw them; take away what was added there."""
        names = self.git("ls-tree", "-r", "-z", "--name-only", "HEAD").decode().split("\0")
        given = {name for name in names if TESTS.search(name)}
        for path in filter(self.holds, list(self.repo.rglob("*"))):
            name = path.relative_to(self.repo).as_posix()
            if TESTS.search(name) and name not in given and (path.is_symlink() or not path.is_dir()):
                path.unlink()
        if given:
            self.git("checkout", "--quiet", "HEAD", "--", *sorted(given))


# %%
#| export
def make_workspace(framework: Framework) -> tuple[Workspace, str]:
    """A new workspace in the temporary folder, and the version of the framework in it."""
    workspace = Workspace(Path(tempfile.mkdtemp(prefix="ate-")).resolve())
    try:
        version = copy_framework(framework, workspace.repo)
    except BaseException:
        shutil.rmtree(workspace.root, ignore_errors=True)
        raise
    for name in ("out", "home", "tmp"):
        (workspace.work / name).mkdir()
    return workspace, version


# %%
workspace, _ = make_workspace(here)
workspace.remember()
assert workspace.diff() == b""
with (workspace.repo / "README.md").open("a") as file:
    file.write("One line more.\n")
subprocess.run(["git", "commit", "--quiet", "--all", "--message", "Hide it"], cwd=workspace.repo, capture_output=True)
print(workspace.diff().decode())
assert b"+One line more." in workspace.diff()
(workspace.repo / "tests" / "conftest.py").write_text("import os; os._exit(0)")
workspace.restore_tests()
assert b"os._exit" not in workspace.diff() and b"+One line more." in workspace.diff()

# %% [markdown]
# ## The sandbox
#
# Under bubblewrap a program sees the system's folders, read-only; the interpreter; and its workspace. It sees
# no home folder, no other process, and not this repository with its answers. Agents need a network to reach
# their model; checks have none, but for the loopback that gloo talks over.
#
# What it writes to `/tmp` is gone with it: that is a folder of its own in memory.
#
# Where bubblewrap is not installed, or the system forbids it its namespaces, the agent runs as any program does, and
# the record says so.


# %%
#| export
def program_paths(program: str) -> set[Path]:
    """What must be readable for a program to start: its folder, its environment, its interpreter."""
    found = shutil.which(program)
    if found is None:
        raise UserError(f"{program}: not found; install it, or put it on PATH")
    path, paths = Path(found).absolute(), set()
    for start in (path, path.parent / "python", path.parent / "python3"):
        if start.exists():
            paths |= {start.parent, start.resolve().parent}
            paths |= {p.parent for p in (start.parent, start.resolve().parent) if p.name == "bin" and p != Path("/bin")}
    home = Path.home().resolve()  # never open a home folder because of a program in its bin
    return {path for path in paths if not home.is_relative_to(path) and path != home / ".local"}


# %%
#| export
def confine(
    command: list[str],
    workspace: Workspace,
    readable: set[Path],
    writable: bool,
    network: bool,
    folder: Path | None = None,
) -> list[str]:
    """`command` under bubblewrap, in `folder` or the repo. `readable` paths stay visible; `writable` is the repo."""
    wrap = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--proc", "/proc", "--dev", "/dev"]
    wrap += ["--share-net"] * network
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            wrap += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            wrap += ["--ro-bind", str(path), str(path)]
    for device in sorted(Path("/dev").glob("nvidia*")):
        wrap += ["--dev-bind", str(device), str(device)]
    wrap += ["--ro-bind", "/usr", "/usr", "--ro-bind", "/etc", "/etc", "--ro-bind", "/sys", "/sys", "--tmpfs", "/tmp"]
    names = Path("/etc/resolv.conf").resolve().parent  # elsewhere, on some systems
    shown, tasks = readable | ({names} if network and names.is_dir() else set()), PACKAGE / "tasks"
    for path in sorted(path for path in shown if not path.is_relative_to(tasks)):
        wrap += ["--ro-bind", str(path), str(path)]
    if any(tasks.is_relative_to(path) for path in shown):  # installed in the environment: the answers are not shown
        wrap += ["--tmpfs", str(tasks)]
    for path in sorted(path for path in shown if path.is_relative_to(tasks)):
        wrap += ["--ro-bind", str(path), str(path)]
    wrap += ["--bind", str(workspace.work), str(workspace.work)]
    if not writable:
        wrap += ["--ro-bind", str(workspace.repo), str(workspace.repo)]
    return [*wrap, "--chdir", str(folder or workspace.repo), "--", *command]


# %%
#| export
def can_confine() -> bool:
    """Whether bubblewrap is installed, and allowed to do its work."""
    probe = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    return shutil.which("bwrap") is not None and subprocess.run(probe, capture_output=True).returncode == 0


# %% [markdown]
# ## The environment
#
# A program gets these variables, those that its agent's file sets, and those that it names. Keys that
# happen to be in the environment of whoever runs the benchmark are not among them.


# %%
#| export
def environment(workspace: Workspace, framework: Framework, names: list[str], extra: dict[str, str]) -> dict[str, str]:
    """The variables of a program in `workspace`: a fixed few, `names` handed on, and `extra`."""
    python = Path(framework.python or sys.executable)
    names = [*names, "LANG", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"]
    return {
        **{name: os.environ[name] for name in names if name in os.environ},
        "PATH": f"{python.parent}:{os.environ.get('PATH', os.defpath)}",
        "HOME": str(workspace.home),
        "TMPDIR": str(workspace.work / "tmp"),
        "PYTHONPATH": str(workspace.repo),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ATE_OUT": str(workspace.out),
        **extra,
    }


# %% [markdown]
# What a program can reach, with and without the sandbox:

# %%
script = f"touch ~/mine && echo own home; ls {here.checkout} | wc -l; touch {workspace.repo}/new && echo repo changed"
shell = ["bash", "-c", f"{script}; touch {workspace.root}/escaped; env | cut -d= -f1 | sort | tr '\\n' ' '"]
variables = environment(workspace, here, [], {})
commands = {"unconfined": shell}
if can_confine():
    commands["confined"] = confine(shell, workspace, set(), writable=False, network=False)
    commands["confined, may edit"] = confine(shell, workspace, set(), writable=True, network=False)
for name, command in commands.items():
    said = subprocess.run(command, env=variables, capture_output=True, text=True).stdout
    print(f"{name}:\n{said}")
    assert (workspace.root / "escaped").exists() == (name == "unconfined")
    (workspace.root / "escaped").unlink(missing_ok=True)
shutil.rmtree(workspace.root)

# %% [markdown]
# What a copy costs in disk: the framework twice, once as files and once in the baseline.

# %%
import matplotlib.pyplot as plt

sizes = {}
workspace, _ = make_workspace(here)
workspace.remember()
for name in ("work/repo", "work/out", "baseline.git"):
    sizes[name] = sum(p.lstat().st_size for p in (workspace.root / name).rglob("*") if p.is_file()) / 1e6
shutil.rmtree(workspace.root)
fig, ax = plt.subplots(figsize=(5, 1.8), layout="constrained")
ax.barh(list(sizes), list(sizes.values()))
ax.set(title="A workspace of PithTrain", xlabel="MB")
fig

# %% [markdown]
# Next: [what a program can tell about an answer](23_check.py).
