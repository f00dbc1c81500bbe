"""The same promises with the last release of huggingface_hub 1, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OLDER = "huggingface_hub==1.33.0"
HERE = Path(__file__).parent
PROMISES = (
    "repository_is_made or one_commit or somebody_else_is or reply_is_looked or branches or "
    "cut_upload or cut_download or gated or offline_the_cache or header_work or statuses or "
    "authors_card or does_not_pass"
)


@pytest.mark.slow
def test_version_1_keeps_the_promises(tmp_path):
    target = tmp_path / "older"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), OLDER]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{OLDER} cannot be installed: {done.stderr[-200:]}")
    paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    code = (
        "import huggingface_hub, pytest, sys; assert huggingface_hub.__version__ == '1.33.0'; "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    files = [str(HERE / "test_push.py"), str(HERE / "test_resolve.py")]
    done = subprocess.run(
        [sys.executable, "-c", code, *files, "-q", "-p", "no:cacheprovider", "-k", PROMISES],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, cwd=HERE.parents[1],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
