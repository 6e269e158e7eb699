"""Runs one data stage in a process of its own: `python -m tests.stage_process KIND CONFIG DIR ROLE=DIR …`.

Exit code 0 with the counts on stdout, or 2 with the StageError on stderr. FILE_LIMIT in the environment is
the largest file in bytes that the process and its children may write: a disk that is full, without the disk.
"""

import json
import os
import resource
import sys
from pathlib import Path

from stages.base import StageError, stage_module
from tests.data_helpers import make_job, never


def main() -> int:
    kind, config, directory, *roles = sys.argv[1:]
    if "FILE_LIMIT" in os.environ:
        limit = int(os.environ["FILE_LIMIT"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    inputs = {role: Path(path) for role, _, path in (part.partition("=") for part in roles)}
    module = stage_module(kind)
    try:
        report = module.run(
            module.Config(**json.loads(config)), make_job(Path(directory), should_stop=never, **inputs)
        )
    except StageError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(report.counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
