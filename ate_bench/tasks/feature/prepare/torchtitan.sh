# A feature runs: what the package needs must be in the interpreter that frameworks/torchtitan.toml names.
python - <<'END'
import re, sys
from importlib.metadata import PackageNotFoundError, distribution, requires

missing = []
for requirement in requires("torchtitan") or []:
    name = re.match(r"[\w.-]+", requirement)[0]
    try:
        if "extra ==" not in requirement:
            distribution(name)
    except PackageNotFoundError:
        missing.append(name)
sys.exit(missing and f"not installed: {', '.join(missing)}; name an interpreter that has them: python = ... in torchtitan.toml")
END
