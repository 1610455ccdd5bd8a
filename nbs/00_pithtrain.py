# %% [markdown]
# # PithTrain
#
# > A compact training system for Mixture-of-Experts language models, written as notebooks.

# %%
#| default_exp __init__

# %%
#| export
from pithtrain.traceback import name_notebooks_in_tracebacks

# %%
#| export
__version__ = "0.1.0"

name_notebooks_in_tracebacks()
