"""A small share of the campaign in bench/fault_campaign.py: kills at random moments and damaged input of every kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from support import REPO


def test_quick_campaign():
    """No case may be wrong, hang, or end in a traceback; and the cases must not all end alike."""
    command = [sys.executable, str(REPO / "bench" / "fault_campaign.py"), "--quick"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["bad"] == 0
    cases = report["cases"]
    assert cases["kill -9"]["identical"] == 3
    damaged = [row for kind, row in cases.items() if kind != "kill -9"]
    assert sum(sum(row.values()) for row in damaged) >= 36
    assert sum(row["clear error"] for row in damaged) > 18
    assert cases["checkpoints"]["identical"] > 0
