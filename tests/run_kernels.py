"""Run the numeric tests under each matrix kernel: `python tests/run_kernels.py [ARG...]`.

The last bits of every product depend on the kernel, and OpenBLAS chooses it by the processor. Here
each of KERNELS runs the tests that compute; one that this processor
or this build lacks is named with what OpenBLAS took instead. Arguments go to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
KERNELS = ("Haswell", "SkylakeX", "Zen", "Nehalem")
# Tests of files, texts, exit codes and whole programs; no product decides them.
WITHOUT_NUMBERS = ("robustness", "formats", "test_cli.py", "test_docs.py", "test_examples.py")

_ARCHITECTURE = """
import numpy, threadpoolctl
print(*(i["architecture"] for i in threadpoolctl.threadpool_info() if "architecture" in i))
"""


def main(arguments: list[str]) -> int:
    """Run all kernels, also after one has failed; return 1 if any has."""
    left_out = [f"--ignore={TESTS / name}" for name in WITHOUT_NUMBERS]
    done: dict[str, str] = {}
    failed = []
    for kernel in KERNELS:
        environment = os.environ | {"OPENBLAS_CORETYPE": kernel}
        used = subprocess.run(
            [sys.executable, "-c", _ARCHITECTURE],
            env=environment, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        if used in done:
            print(f"{kernel}: OpenBLAS takes {used} here, as for {done[used]}", flush=True)
            continue
        done[used] = kernel
        print(f"{kernel}: OpenBLAS takes {used}", flush=True)
        command = [sys.executable, "-m", "pytest", *left_out, str(TESTS), *arguments]
        if subprocess.run(command, env=environment, cwd=TESTS.parent).returncode:
            failed.append(kernel)
    print(f"failed under {', '.join(failed)}" if failed else f"passed under {', '.join(done)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
