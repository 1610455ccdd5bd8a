# %% [markdown]
# # Errors: how much a traceback tells
#
# > Sorts every `raise` and `assert` by what its message will say, and finds handlers that say nothing.
#
# How much a traceback helps cannot be measured without a failure to look at, and what fails differs from
# framework to framework. What can be counted is what the code *would* say. The proxy: each place that
# raises is in one of three classes, and the score of a framework is the share of the first.
#
# | class | the message | the reader learns |
# |---|---|---|
# | tells | holds a value computed at run time | what was wrong, with which value |
# | says | is a fixed text | what was wrong |
# | mute | is empty | where to start reading |
#
# Beside it stand the handlers that *swallow*: `except:` or `except Exception:` whose body neither raises,
# nor uses the error, nor logs. A failure there has no traceback at all.
#
# What the proxy misses: failures that no one foresaw, which surface inside torch, and messages that are
# wrong. A re-raise (`raise` alone) passes on what there is and is not counted.

# %%
#| default_exp errors

# %%
#| export
import ast
from dataclasses import dataclass

from ate_bench.indirection import last_name
from ate_bench.source import Source

# %%
from pathlib import Path

from ate_bench.source import parse, read_sources


# %% [markdown]
# ## One message


# %%
#| export
def message_class(parts: list[ast.expr]) -> str:
    """`tells`, `says` or `mute`, for the arguments of an exception."""
    nodes = [node for part in parts for node in ast.walk(part)]
    if any(isinstance(node, ast.Name | ast.Attribute | ast.Call) for node in nodes):
        return "tells"  # an f-string's values, a % or format argument, a variable
    return "says" if any(isinstance(node, ast.Constant) and node.value for node in nodes) else "mute"


# %%
for text in ('f"top_k is {top_k}"', '"bad top_k"', '""', '"top_k %d" % k', 'f"bad"'):
    print(f"{text:22} {message_class([ast.parse(text, mode='eval').body])}")


# %%
#| export
@dataclass(frozen=True)
class Errors:
    """Numbers of places that raise, by class, and of handlers that swallow."""

    tells: int
    says: int
    mute: int
    swallow: int

    @property
    def telling(self) -> float:
        """The share of raising places whose message holds a value."""
        return self.tells / max(self.tells + self.says + self.mute, 1)


# %% [markdown]
# ## All places
#
# `raise ValueError` and `raise ValueError()` are mute; `assert x` is mute too: its traceback shows the line
# and not the value. A broad handler that mentions the error or calls anything whose name speaks of logging,
# warning or printing has said something.


# %%
#| export
def swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a broad handler drops the error without a word."""
    broad = handler.type is None or last_name(handler.type) in ("Exception", "BaseException")
    inside = [node for statement in handler.body for node in ast.walk(statement)]
    words = ("log", "warn", "print", "error", "exception", "info", "debug", "exit", "fail")
    speaks = any(
        isinstance(node, ast.Raise)
        or (isinstance(node, ast.Name) and handler.name is not None and node.id == handler.name)
        or (isinstance(node, ast.Call) and any(word in last_name(node).lower() for word in words))
        for node in inside
    )
    return broad and not speaks


# %%
#| export
def count_errors(sources: list[Source]) -> Errors:
    """The classes of all raising places and the swallowing handlers of `sources`."""
    counts = {"tells": 0, "says": 0, "mute": 0, "swallow": 0}
    for source in sources:
        for node in ast.walk(source.tree) if source.tree is not None else ():
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                counts[message_class([*node.exc.args, *(k.value for k in node.exc.keywords)])] += 1
            elif isinstance(node, ast.Raise) and node.exc is not None and last_name(node.exc)[:1].isupper():
                counts["mute"] += 1
            elif isinstance(node, ast.Assert):
                counts[message_class([node.msg] if node.msg else [])] += 1
            elif isinstance(node, ast.ExceptHandler):
                counts["swallow"] += swallows(node)
    return Errors(**counts)


# %%
example = parse("""
def load(path, step):
    assert step >= 0
    try:
        return read(path)
    except FileNotFoundError as error:
        raise error
    except Exception:
        pass
    if step > 10:
        raise ValueError(f"{path}: no step {step}")
    raise RuntimeError("could not load")
""")
errors = count_errors([example])
print(errors, f"{errors.telling:.0%}")
assert errors == Errors(tells=1, says=1, mute=1, swallow=1)

# %% [markdown]
# ## PithTrain's own

# %%
import matplotlib.pyplot as plt

import pithtrain

errors = count_errors(read_sources(Path(pithtrain.__file__).parent))
print(errors)
fig, ax = plt.subplots(figsize=(6, 2), layout="constrained")
ax.barh(["tells", "says", "mute", "swallow"], [errors.tells, errors.says, errors.mute, errors.swallow])
ax.set(title=f"{errors.telling:.0%} of PithTrain's raising places hold a value", xlabel="places")
fig

# %% [markdown]
# Next: [from a question to the code that answers it](15_trail.py).
