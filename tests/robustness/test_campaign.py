"""A sample of the campaigns against every command that writes; `campaign.py` runs them whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CAMPAIGNS = {
    "faults": ["--every", "60"],
    "signals": ["--count", "8"],
    "changes": ["--count", "3"],
    "writers": ["--count", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_sample_of_cases(name):
    if name == "faults" and shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "campaign.py", name, *CAMPAIGNS[name]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert "!!" not in done.stdout
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" 0 bad") >= 17
