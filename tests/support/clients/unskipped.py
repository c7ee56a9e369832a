"""Run a unittest file with the tests that it skips without a condition.

    unskipped.py FILE [ARGUMENT ...]

op-plugin skips tests for want of the newest CANN on its own machines.
"""

from __future__ import annotations

import runpy
import sys
import unittest

if __name__ == "__main__":
    unittest.skip = lambda _: lambda test: test
    del sys.argv[0]
    sys.path.insert(0, "")
    runpy.run_path(sys.argv[0], run_name="__main__")
