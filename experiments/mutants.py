"""Keep what mutmut found, counted per file: `make mutants` runs mutmut, then this."""

import json
import sys
from collections import Counter
from pathlib import Path

from mutmut.stats import status_by_exit_code

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere
from experiments import results


def main():
    folder, found = results.ROOT / "mutants", {}
    for path in sorted(folder.rglob("*.meta")):
        codes = json.loads(path.read_text("utf-8"))["exit_code_by_key"].values()
        name = str(path.relative_to(folder).with_suffix("").with_suffix(""))
        found[name] = Counter(status_by_exit_code[code] for code in codes)
    files = sorted({*found} - {*results.CORE})
    results.keep("mutants", 0, "", "mutmut", found, files)


if __name__ == "__main__":
    main()
