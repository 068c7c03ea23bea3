"""Record what Hugging Face transformers renders: `python make.py FOLDER` writes renderings.json.

FOLDER holds .jinja files, such as models/templates of a llama.cpp source tree; transformers 5.23
and jinja2 3.1.6 were used. Every dialogue of dialogues.json is rendered with reasoning left alone,
switched on and switched off, with and without a generation prompt; the six texts are kept as one
digest.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(folder: Path) -> None:
    sys.path.insert(0, str(HERE.parents[2]))
    from transformers.utils.chat_template_utils import _compile_jinja_template

    from tests.renderings import render_all

    dialogues = json.loads((HERE / "dialogues.json").read_text())
    found = {
        path.name: render_all(_compile_jinja_template(path.read_text()), dialogues)
        for path in sorted(folder.glob("*.jinja"))
    }
    (HERE / "renderings.json").write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
