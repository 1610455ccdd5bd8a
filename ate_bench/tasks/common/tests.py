"""Runs tests that passed before: python tests.py REPO TEST..."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

with tempfile.TemporaryDirectory() as folder:
    report = Path(folder, "report.xml")  # pytest's own, at its end: code under test may print "9 passed", and leave
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *sys.argv[2:]]
    variables = {**os.environ, "CI": "true", "PYTHONPATH": sys.argv[1]}
    done = subprocess.run(command, cwd=sys.argv[1], env=variables, capture_output=True, text=True)
    print(done.stdout[-3000:], done.stderr[-1000:])
    suite = ElementTree.parse(report).find("testsuite").attrib if report.exists() else {}
failed, skipped = (sum(int(suite.get(kind, 0)) for kind in kinds) for kinds in (("failures", "errors"), ("skipped",)))
passed = int(suite.get("tests", 0)) - failed - skipped
if not suite:
    print(f"FAIL pytest left with {done.returncode} before its end")
else:
    word = "FAIL" if done.returncode or not passed else "PASS"
    print(f"{word} {passed} passed, {failed} failed, {skipped} skipped")
