# %% [markdown]
# # Exercise: a save that is whole or absent
#
# > Save a state so that a crash at any moment leaves the last save intact.
#
# A process can be killed between any two instructions. Whoever writes over the old checkpoint has, for some
# moments, none at all; on a large model those are minutes. [Checkpoints](../66_checkpoint.py) are therefore
# written beside their place, and renamed when they are whole: within a file system, a rename happens or does
# not.
#
# ## The task
#
# Write `my_save(folder, step, state, keep)`. It saves `state`, with the given `write(state, path)`, as the file
# `step-00000200.pt` in `folder` (for step 200), and keeps the newest `keep` such files. Whatever happens in
# between, a file with such a name must be whole, and the newest one that was saved before must still be there.
# `os.replace` renames.

# %%
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import torch


def write(state, path):
    """Takes long, in real life."""
    torch.save(state, path)


def my_save(folder, step, state, keep, write=write):
    raise NotImplementedError  # your turn


# %% [markdown]
# ## The check
#
# It saves four times, then crashes in the middle of the writing, with half of a file written; and looks at what
# is there. Then it saves again.


# %%
class Crash(Exception):
    """The process ends here."""


def crash_halfway(state, path):
    write(state, path)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    raise Crash


def saved(folder):
    return {path.name: torch.load(path)["step"] for path in sorted(folder.glob("step-*.pt"))}


def check(save):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in (100, 200, 300, 400):
            save(folder, step, {"step": step, "weights": torch.randn(1000)}, keep=2)
        want = {"step-00000300.pt": 300, "step-00000400.pt": 400}
        assert saved(folder) == want, f"after four saves: {saved(folder)}, want {want}"
        for step in (500, 400):  # a new one, and one that is there already
            with suppress(Crash):
                save(folder, step, {"step": step, "weights": torch.randn(1000)}, 1, write=crash_halfway)
            try:
                found = saved(folder)
            except Exception as error:
                raise AssertionError(f"after a crash while saving {step}: a file is not whole ({error})") from None
            assert found == want, f"after a crash while saving {step}: {found}, want {want}"
        save(folder, 500, {"step": 500, "weights": torch.randn(1000)}, keep=1)
        assert saved(folder) == {"step-00000500.pt": 500}, f"after the next save: {saved(folder)}"
        left = [path.name for path in folder.iterdir()]
        assert len(left) == 1, f"after the next save, there is {left}"
    print("Right.")


try:
    check(my_save)
except NotImplementedError:
    print("Not written yet.")

# %% [markdown]
# ## A mistake worth making
#
# Making room first:


# %%
def tidy(folder, step, state, keep, write=write):
    for old in sorted(folder.glob("step-*.pt"))[: -(keep - 1) or None]:
        old.unlink()
    write(state, folder / f"step-{step:08}.pt")


try:
    check(tidy)
    raise SystemExit("the check let a mistake pass")
except AssertionError as error:
    print(str(error)[:120], "...")

# %% [markdown]
# ## A solution


# %% tags=["hide-cell"]
def solution(folder, step, state, keep, write=write):
    for unfinished in folder.glob("unfinished-*"):
        unfinished.unlink()  # of a crash before
    beside = folder / f"unfinished-{step:08}"
    write(state, beside)
    os.replace(beside, folder / f"step-{step:08}.pt")
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()


check(solution)

# %% [markdown]
# One thing is missing, which no crash of a process shows: when the *machine* loses its power, a renamed file
# may be there and its bytes may not. `os.fsync` on the file before the rename, and on the folder after it,
# closes that gap; [the real one](../66_checkpoint.py) does it.
#
# ## To think about
#
# - Names sort as numbers do, because of the zeros. What breaks without them, and at which step?
# - With many ranks, each writing a part: when is the whole whole, and who may rename?
#
# Back to the [exercises](../../docs/learn/exercises.md).
