"""What the pages show of bench/results: pictures as pictures/NAME.png, and tables as they are.

<!-- include: bench/results/FILE.md -->   becomes the file, without its title
"""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)


def on_files(files, config):
    for picture in sorted(RESULTS.rglob("*.png")):
        name = "-".join(picture.relative_to(RESULTS).parts)  # nvidia-h200-step.png
        files.append(File.generated(config, f"pictures/{name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, **_):
    return INCLUDE.sub(lambda match: included(ROOT / match[1]), markdown)


def included(path):
    """The text of a result, its title left out and its headings one level down."""
    if not path.is_file():
        raise PluginError(f"there is no {path.relative_to(ROOT)} to include")
    _, _, text = path.read_text().partition("\n")
    return re.sub(r"^(#+ )", r"#\1", text.strip(), flags=re.MULTILINE)
