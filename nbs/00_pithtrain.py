# %% [markdown]
# # PithTrain
#
# > A compact training system for Mixture-of-Experts language models, written as notebooks.

# %%
#| default_exp __init__

# %%
#| export
__version__ = "0.1.0"
