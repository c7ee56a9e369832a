"""Pack a dump of msprobe_layer.py for the tests: `python pack.py DUMP ZIP`.

Leaves out tensors of other operators, and what names the machine.
"""

import json
import sys
import zipfile
from pathlib import Path

dump, target = map(Path, sys.argv[1:])
with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
    for file in sorted(dump.rglob("*")):
        if not (file.name == "dump.json" or file.name.startswith("NPU.")):
            continue
        data = file.read_bytes()
        if file.name == "dump.json":
            description = json.loads(data)
            description["dump_data_dir"] = str(file.parent.relative_to(dump) / "dump_tensor_data")
            data = json.dumps(description).encode()
        info = zipfile.ZipInfo(str(file.relative_to(dump)), (2026, 1, 1, 0, 0, 0))
        info.compress_type = zipfile.ZIP_DEFLATED
        out.writestr(info, data)
