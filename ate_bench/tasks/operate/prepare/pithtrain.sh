# AGENTS.md speaks of .venv/bin/python: the environment that has what PithTrain needs.
ln -s "$(python -c 'import sys; print(sys.prefix)')" .venv
