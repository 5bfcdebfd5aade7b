"""What transformers makes of a folder's tokenizer, for comparison at a conversion; in a process of its own.

python -m weights.transformers_ids FOLDER prints the probe's ids as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from weights.text_tokenizer import PROBE

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SECONDS = 60  # it starts in about five


def ids_by_transformers(folder: Path) -> list[int] | None:
    """PROBE's ids with what stands around them, or None where transformers is not installed or cannot read the folder.

    It sees copies of the tokenizer's files alone: neither the model's config nor code.
    """
    with tempfile.TemporaryDirectory() as copy:
        for name in FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(copy) / name)
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "weights.transformers_ids", copy],
                cwd=Path(__file__).resolve().parent.parent,
                env=os.environ | quiet,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
            )
            return json.loads(done.stdout) if done.returncode == 0 else None
        except (subprocess.TimeoutExpired, ValueError, OSError):
            return None


def main() -> int:
    """Prints the ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
    print(json.dumps(tokenizer.encode(PROBE)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
