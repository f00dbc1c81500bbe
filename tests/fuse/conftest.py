"""The dense fuse that the tests of placement use serves here, too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "placement"))
