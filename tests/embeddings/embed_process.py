"""`embed` in a process of its own; options as JSON."""

import json
import sys

from csdiff.embeddings import EmbedConfig, embed
from csdiff.errors import CSDiffError

if __name__ == "__main__":
    try:
        embed(EmbedConfig(**json.loads(sys.argv[1])))
    except CSDiffError as error:
        sys.exit(f"refused: {error}")
