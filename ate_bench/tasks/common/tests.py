"""Runs tests that passed before: python tests.py REPO TEST..."""

import os
import subprocess
import sys

command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sys.argv[2:]]
done = subprocess.run(command, cwd=sys.argv[1], env={**os.environ, "CI": "true"}, capture_output=True, text=True)
print(done.stdout[-3000:])
last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
print(f"{'FAIL' if done.returncode else 'PASS'} {last}")
