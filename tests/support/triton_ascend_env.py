"""The environment in which triton is triton-ascend: where it is, and how it is finished.

    python tests/ascend.py FOLDER

lets the environment in FOLDER, into which triton-ascend has been installed, find everything else in
the one that runs this.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ENVIRONMENT = "MOE_TRITON_ASCEND"  # another place for it


def python(package: str = "triton") -> Path | None:
    """Its interpreter, or None where ``make`` could not install it, or it lacks a package."""
    folder = os.environ.get(ENVIRONMENT) or Path(sys.prefix) / "ascend"
    actual = Path(folder) / "bin/python"
    packages = [path.parent for path in Path(folder).glob("lib/*/site-packages/*_base.pth")]
    works = actual.exists() and any((path / package).exists() for path in packages)
    return actual if works else None


def main() -> None:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    interpreter = Path(sys.argv[1]) / "bin/python"
    packages = subprocess.run(
        [interpreter, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    # Read after the packages there, so that its triton comes first.
    own = sysconfig.get_path("purelib")
    (Path(packages) / "zz_base.pth").write_text(f"{own}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
